"""The functions: check the arguments, find memory for the results, call a kernel."""

from fastbn.functional.calls import (
    Cache,
    Moments,
    batch_moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_backward_reduce,
    batch_norm_inference,
    inference_with_cache,
    instance_norm,
    instance_norm_backward,
    merge_moments,
    normalize,
    update_running,
    use_kernels,
)

__all__ = [
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
