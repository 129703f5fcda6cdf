"""Which kernel variant runs here: picked once, at import."""

import os
import platform
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastbn.runtime import blas
from fastbn.runtime.caches import caches
from fastbn.runtime.cpu import cpu_features
from fastbn.runtime.pool import get_num_threads

# The variants, slowest first, and the CPU features that each needs. They need f16c too, which not
# every compiler can ask for; CPUs with AVX2 have it.
NEEDED = {
    "baseline": set[str](),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma"},
}


def available_isas() -> list[str]:
    """Return the variants that are built and that this machine can run, slowest first."""
    features = set(cpu_features())
    return [
        isa
        for isa, needed in NEEDED.items()
        if needed <= features and find_spec(f"fastbn.kernels.{isa}")
    ]


def _pick() -> str:
    available = available_isas()
    if not available:
        raise ImportError(
            "fastbn: no compiled kernels beside the package; install it with `pip install .` "
            "from the root of the checkout, which also compiles them"
        )
    wanted = os.environ.get("FASTBN_ISA")
    if wanted is None:
        return available[-1]
    if wanted not in available:
        raise ImportError(
            f"FASTBN_ISA: expected one of {', '.join(available)} (what is built and what this CPU "
            f"and its operating system can run), got {wanted!r}"
        )
    return wanted


isa = _pick()
kernels = import_module(f"fastbn.kernels.{isa}")


def runtime_info() -> dict[str, Any]:
    """Describe what runs: versions, machine, kernel variant, threads, caches.

    Returns
    -------
    dict
        ``fastbn``, ``numpy``, ``python``: versions. ``platform``: operating system and machine.
        ``cpu_features``: the vector instructions beyond the baseline that CPU and operating system
        can run, as far as a variant needs them. ``isa``: the kernel variant in use.
        ``available_isas``: those that FASTBN_ISA can name. ``threads``: how many threads one call
        uses at most. ``caches``: levels 1 and 2 of a core and the share of the last level that
        this process counts on, as found or as FASTBN_CACHES says (``"32K,1M,32M"``).
        ``openblas_thread_timeout``: how long idle threads of OpenBLAS spin, as 2 to this power
        cycles, or "unset" where NumPy was loaded without a word: they then spin for some 0.1 s,
        which takes a CPU away from fastbn's own threads after each matrix product.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.runtime_info()["fastbn"] == fastbn.__version__
    True
    """
    from fastbn import __version__

    return {
        "fastbn": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpu_features": cpu_features(),
        "isa": isa,
        "available_isas": available_isas(),
        "threads": get_num_threads(),
        "caches": str(caches),
        "openblas_thread_timeout": blas.thread_timeout,
    }
