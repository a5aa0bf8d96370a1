"""The GPU's fused kernel on CPU tensors, in Triton's interpreter: for checking it without a GPU, never for speed.

Triton decides at its import, for the whole process, whether its functions are compiled or interpreted. `load` turns the
interpreter on where Triton has not been imported yet, after which the process can compile none for a GPU.
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
    """Why it cannot run on `device` (None: on no device), or None where it can: then it is loaded now."""
    if device is not None and device.type != "cpu":
        return f"Triton's interpreter runs on the CPU, and it was asked to run on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return fused.WITHOUT_TRITON
    if not load():
        return "Triton was loaded in this process to compile; set TRITON_INTERPRET=1 before Python starts"
    return None


def load() -> bool:
    """Import the device kernels with the interpreter on, for the whole process. False if Triton compiles already."""
    if "triton" not in sys.modules or fused.is_interpreting():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its import
        importlib.import_module("bncli.kernels.fused.triton")
    return fused.is_interpreting() and bool(sys.modules["bncli.kernels.fused.triton"].INTERPRETED)
