import numpy as np
import pytest
from support import KERNELS

from fastbn import _dispatch, functional


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
    functional.use_kernels(_dispatch.kernels)
