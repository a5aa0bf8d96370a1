"""The fused GPU kernel on CPU tensors, in Triton's interpreter: to check it without a GPU, not for speed.

Triton decides at import, for the whole process, whether its functions are compiled or interpreted. The first call
turns the interpreter on; after that the process cannot compile for a GPU.
"""

from __future__ import annotations

import functools

from bncli.kernels import fused

batch_norm = functools.partial(fused.batch_norm, interpreted=True)
unavailable_reason = functools.partial(fused.unavailable_reason, interpreted=True)
