"""How long idle threads of NumPy's BLAS wait for work.

OpenBLAS's threads spin without yielding after each matrix product, for some 0.1 s. Calls of fastbn
that follow then run on one CPU less. OPENBLAS_THREAD_TIMEOUT makes them sleep sooner, but OpenBLAS
reads it only when it is loaded. So where fastbn is imported before NumPy, and nobody else has set
it, it is set while NumPy is loaded.
"""

import os
import sys

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"

if VARIABLE not in os.environ and "numpy" not in sys.modules:
    os.environ[VARIABLE] = thread_timeout = "16"
    import numpy  # noqa: F401

    del os.environ[VARIABLE]
else:
    thread_timeout = os.environ.get(VARIABLE, "unset")
