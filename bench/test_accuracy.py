"""How the error of y grows with the mean of x, at a standard deviation of 1."""

import pytest
from peers import PEERS
from workloads import CORES, Data, Workload, images

FIRST, LAST = images("accuracy", 32, 8, 28, 28)
MEANS = [0.0, *(10.0**k for k in range(7))]


@pytest.mark.parametrize(
    ("contender", "workload"),
    [(name, FIRST) for name in ("fastbn", "numpy", "torch", "jax")]
    + [(name, LAST) for name in ("torch", "tensorflow")],
    ids=lambda value: value.layout if isinstance(value, Workload) else value,
)
def test_error_against_mean(contender, workload, benchmark):
    def error(mean):
        d = Data(workload, offset=mean)
        peer = PEERS[contender](d, CORES)
        (forward,) = peer.forward(None).values()
        return d.error("forward", peer.array(forward()))

    benchmark.group = "error against mean"  # its times mean nothing
    try:
        errors = benchmark.pedantic(lambda: [[mean, error(mean)] for mean in MEANS])
    except ImportError as problem:
        pytest.skip(f"{contender}: {problem}")
    benchmark.extra_info.update(contender=contender, layout=workload.layout, errors=errors)
