"""What the machine offers: CPU and caches, threads, memory."""

from importlib.util import find_spec

if find_spec("fastbn.runtime.cpu") is None:
    raise ImportError(
        f"fastbn: expected compiled modules in {__path__[0]}, got sources alone. `pip install .` "
        "puts a compiled package elsewhere; use it from another folder than the checkout, by the "
        "command `fastbn`, or compile it here with `pip install -e .`"
    )
