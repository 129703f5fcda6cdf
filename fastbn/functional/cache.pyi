from typing import final

import numpy as np
from numpy.typing import NDArray

from fastbn.functional.moments import Moments

@final
class Cache:
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def var(self) -> NDArray[np.float64]: ...
    @property
    def moments(self) -> Moments: ...

def merged(
    means: NDArray[np.float64],
    lows: NDArray[np.float64],
    variances: NDArray[np.float64],
    counts: NDArray[np.float64],
) -> Moments: ...
def update_running(
    cache: Cache, mean: NDArray[np.float64], var: NDArray[np.float64], weight: float
) -> None: ...
