"""The GPU's fused kernel on CPU tensors, in Triton's interpreter: for checking it without a GPU, never for speed.

Triton settles at its import whether its functions are compiled or interpreted, for the whole process. So this kernel
turns the interpreter on where Triton has not been imported yet, after which the process can compile none for a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys

import torch

from bncli.kernels import fused

batch_norm = functools.partial(fused.batch_norm, interpreted=True)


def unavailable_reason(device: torch.device | None) -> str | None:
    """Why it cannot run on `device` (None: here at all), or None where it can."""
    if device is not None and device.type != "cpu":
        return f"Triton's interpreter runs on the CPU, and it was asked to run on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return fused.WITHOUT_TRITON
    if "triton" not in sys.modules or fused.is_interpreting():
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("bncli.kernels.fused.triton")
    if not fused.is_interpreting() or not sys.modules["bncli.kernels.fused.triton"].INTERPRETED:
        return "Triton was loaded in this process to compile; set TRITON_INTERPRET=1 before Python starts"
    return None
