"""The functions: check the arguments, find memory for the results, call a kernel."""

from fastbn.functional.batch_norm import Activation as Activation
from fastbn.functional.batch_norm import batch_norm as batch_norm
from fastbn.functional.batch_norm import batch_norm_backward as batch_norm_backward
from fastbn.functional.batch_norm import batch_norm_inference as batch_norm_inference
from fastbn.functional.batch_norm import inference_with_cache as inference_with_cache
from fastbn.functional.entry import Cache as Cache
from fastbn.functional.entry import update_running as update_running
from fastbn.functional.entry import use_kernels as use_kernels
from fastbn.functional.instance_norm import instance_norm as instance_norm
from fastbn.functional.instance_norm import instance_norm_backward as instance_norm_backward
from fastbn.functional.moments import Moments as Moments
from fastbn.functional.parts import batch_moments as batch_moments
from fastbn.functional.parts import batch_norm_backward_apply as batch_norm_backward_apply
from fastbn.functional.parts import batch_norm_backward_reduce as batch_norm_backward_reduce
from fastbn.functional.parts import merge_moments as merge_moments
from fastbn.functional.parts import normalize as normalize
