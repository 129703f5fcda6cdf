"""The contenders of `fastbn bench`, and what is compiled here: oneDNN, a ceiling that streams."""

from functools import lru_cache

import bare
import numpy as np
import onednn

from fastbn.cli import peers
from fastbn.cli.cases import EPS
from fastbn.cli.peers import OURS, PEERS, Contender


class OneDnn(Contender):
    """With the best of its memory formats, whatever the others use; reordering is not counted."""

    distributions = ("onednn-cpu-gomp",)
    layouts = ("NCHW", "NHWC")

    def forward(self):
        return self._ways("forward", "y")

    def backward(self):
        return self._ways("backward", "dx")

    def inference(self):
        return self._ways("inference", "y")

    def _ways(self, name, result):
        def way(case):
            run = getattr(case, name)
            return lambda: (run(), case, result)

        cases = _filled(self.arrays, self.case.layout, self.case.threads)
        return {memory_format: way(case) for memory_format, case in cases.items()}

    def array(self, result):
        _, case, name = result
        array = case.get()[name]
        return np.moveaxis(array, 1, -1) if self.case.layout == "NHWC" else array


class Ceiling(peers.Ceiling):
    """Copying or adding by NumPy, or by loops that store past the cache: what is faster."""

    def _move(self, move, *inputs):
        streaming = bare.copy_past_cache if len(inputs) == 1 else bare.add_past_cache
        ways = super()._move(move, *inputs)
        more = super()._move(streaming, *inputs)
        return {**ways, **{f"{name}, past the cache": way for name, way in more.items()}}


@lru_cache(maxsize=1)  # filling the buffers takes longer than the race
def _filled(a, layout, threads):
    x, dy = (np.moveaxis(each, -1, 1) if layout == "NHWC" else each for each in (a.x, a.dy))
    library = onednn.load(threads)
    filled = {each: library.prepare(x.shape, each) for each in onednn.LAYOUTS}
    for each in filled.values():
        each.set(x, dy, a.gamma, a.beta, EPS)
        each.forward()  # its statistics are what the other two use
    return filled


PEERS = {**PEERS, "onednn": OneDnn}
CONTENDERS = {**OURS, "ceiling": Ceiling, **PEERS}
