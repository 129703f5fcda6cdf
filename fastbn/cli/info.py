"""Show versions, CPU features, the kernel variant in use and threads."""

import fastbn


def run() -> int:
    """Print what is known about this installation and this machine."""
    for name, value in fastbn.runtime_info().items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    return 0
