"""The fused GPU kernel on CPU tensors, in Triton's interpreter: to check it without a GPU, not for speed.

Triton decides at import, for the whole process, whether its functions are compiled or interpreted. The first call
turns the interpreter on (`fused.load_interpreted`); after that the process cannot compile for a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch

from bncli.kernels import fused

batch_norm = functools.partial(fused.batch_norm, interpreted=True)


def unavailable_reason(device: torch.device | None) -> str | None:
    """Why the kernel cannot run on `device` (None: on any device), or None if it can."""
    if device is not None and device.type != "cpu":
        return f"Triton's interpreter runs on the CPU, and it was asked to run on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return fused.WITHOUT_TRITON
    if "triton" in sys.modules and not fused.is_interpreting():
        return fused.TRITON_COMPILES
    return None
