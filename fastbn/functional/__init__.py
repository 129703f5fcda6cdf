"""The functions: check the arguments, find memory for the results, call a kernel."""

from fastbn.functional.batch_norm import (
    Activation,
    Array,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    inference_with_cache,
)
from fastbn.functional.entry import Cache, update_running, use_kernels
from fastbn.functional.instance_norm import instance_norm, instance_norm_backward
from fastbn.functional.moments import Moments
from fastbn.functional.parts import (
    batch_moments,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    merge_moments,
    normalize,
)

__all__ = [
    "Activation",
    "Array",
    "Cache",
    "Moments",
    "batch_moments",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_inference",
    "inference_with_cache",
    "instance_norm",
    "instance_norm_backward",
    "merge_moments",
    "normalize",
    "update_running",
    "use_kernels",
]
