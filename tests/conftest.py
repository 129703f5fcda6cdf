import contextlib
import os
import signal

import numpy as np
import pytest
from hypothesis import settings
from support import BFLOAT16, KERNELS

import fastbn
from fastbn import functional
from fastbn.kernels import variants

if os.environ.get("CI"):  # the same examples in every run: what fails there was not there before
    settings.register_profile("same", derandomize=True, database=None)
    settings.load_profile("same")

# A job in the background of a shell may ignore it, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def away_from_the_checkout(tmp_path_factory):
    """Let processes that tests start import the installed package, not the sources in the way."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request):
    """Run the test with each kernel variant that this machine can run."""
    if request.param not in KERNELS:
        pytest.skip(f"{request.param} is not built or does not run on this machine")
    functional.use_kernels(KERNELS[request.param])
    yield request.param
    functional.use_kernels(variants.kernels)


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request):
    """Run the test with several numbers of threads."""
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(request.param)
    yield request.param
    fastbn.set_num_threads(before)


@pytest.fixture(params=["float16", "bfloat16"])
def short(request):
    """Run the test with each 16-bit type."""
    if request.param == "float16":
        return np.dtype(np.float16)
    if BFLOAT16 is None:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")
    return BFLOAT16
