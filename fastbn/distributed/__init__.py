"""Training over several processes, by a communicator of mpi4py (extra `mpi`).

`BatchNorm(..., comm=)` shares its minibatch with the other ranks; this is what else data-parallel
training needs. Nothing here imports mpi4py: any object with `rank`, `size` and the methods that
docstrings name can be a communicator.
"""

from fastbn.distributed.gradients import average_gradients as average_gradients
from fastbn.distributed.replicas import broadcast as broadcast
from fastbn.distributed.replicas import split as split

__all__ = ["average_gradients", "broadcast", "split"]
