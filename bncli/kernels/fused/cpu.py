"""Fused batch norm on a CPU: forward and backward, implemented in cpu.cpp, with the signatures of triton_launch."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.fused.build import library
from bncli.kernels.layout import accumulation, is_channels_last, refuse_gaps, sign_bytes

SOURCE = Path(__file__).with_name("cpu.cpp")
DEFINITIONS = {torch.float32: "FP32", torch.float64: "FP64", torch.bfloat16: "BF16", torch.float16: "FP16"}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3}
CALL = struct.Struct("15P7q2d")  # struct call of cpu.cpp

Run = Callable[[bytes], int]


class Compiled(NamedTuple):
    """The functions of cpu.cpp for one element type, looked up once since that takes longer than a small call."""

    forward: Run
    backward: Run
    division: Run


@functools.cache
def compiled(dtype: torch.dtype) -> Compiled:
    """cpu.cpp compiled for that element type. Raises Unavailable if it cannot be compiled."""
    found = library(SOURCE, DEFINITIONS[dtype])
    functions = Compiled(found.forward, found.backward, found.division)
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int  # type: ignore[attr-defined]
    return functions


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernel cannot run here, or None. It is compiled by this call unless it is cached."""
    try:
        compiled(torch.float32)
    except Unavailable as error:
        return str(error)
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    activation: str,
    keep_signs: bool,
    *,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y like x, the mean and variance (C) that normalized, the sign bits if `keep_signs`. Updates `running`."""
    wide, channels_last = accumulation(x), is_channels_last(x)
    if not (channels_last or x.is_contiguous()):
        refuse_gaps(x)
    y = torch.empty_like(x)
    if statistics is None:
        mean, var = x.new_empty(x.size(1), dtype=wide), x.new_empty(x.size(1), dtype=wide)
    else:
        mean, var = statistics
        if mean.dtype != wide or var.dtype != wide:
            mean, var = mean.to(wide), var.to(wide)
    signs = x.new_empty(sign_bytes(x), dtype=torch.uint8) if keep_signs else None
    running_mean, running_var, momentum = running or (None, None, 0.0)
    if weight is not None and weight.dtype != wide:  # a conversion to the same dtype takes half a microsecond
        weight = weight.to(wide)
    if bias is not None and bias.dtype != wide:
        bias = bias.to(wide)
    tensors = (x, residual, None, y, None, None, weight, bias, mean, var, running_mean, running_var, None, None, signs)
    _call(compiled(x.dtype).forward, tensors, x, channels_last, activation, statistics is not None, eps, momentum)
    return y, mean, var, signs


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    signs: Tensor | None,
    eps: float,
    activation: str,
    frozen: bool,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx like x, dweight and dbias (C) in the dtypes of weight and bias, dresidual like x if `residual_gradient`."""
    wide = accumulation(x)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual_gradient else None
    dweight, dbias = x.new_empty(x.size(1), dtype=wide), x.new_empty(x.size(1), dtype=wide)
    mean, var = statistics
    if mean.dtype != wide or var.dtype != wide:
        mean, var = mean.to(wide), var.to(wide)
    wide_weight = weight.to(wide) if weight is not None and weight.dtype != wide else weight
    wide_bias = bias.to(wide) if bias is not None and bias.dtype != wide else bias
    tensors = (
        x, residual, dy, None, dx, dresidual, wide_weight, wide_bias, mean, var, None, None, dweight, dbias, signs
    )  # fmt: skip
    _call(compiled(x.dtype).backward, tensors, x, is_channels_last(x), activation, frozen, eps, 0.0)
    if weight is not None and weight.dtype != wide:
        dweight = dweight.to(weight.dtype)
    if bias is not None and bias.dtype != wide:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def _call(
    run: Run,
    tensors: tuple[Tensor | None, ...],
    x: Tensor,
    channels_last: bool,
    activation: str,
    frozen: bool,
    eps: float,
    momentum: float,
) -> None:
    """Call a function of cpu.cpp. tensors: in the order of its struct call."""
    pointers = []
    for tensor in tensors:
        if tensor is None:
            pointers.append(0)
        elif tensor.is_cpu:
            pointers.append(tensor.data_ptr())
        else:
            raise RuntimeError(f"x is on the CPU; another tensor of the same batch norm is on {tensor.device}")
    examples, channels = x.size(0), x.size(1)
    positions = x.numel() // (examples * channels)
    code, threads = ACTIVATIONS[activation], torch.get_num_threads()
    if run(CALL.pack(*pointers, examples, channels, positions, channels_last, code, frozen, threads, eps, momentum)):
        raise MemoryError("the fused kernel could not allocate its sums")


def thread_division(x: Tensor) -> str:
    """How the work on a dense x (N, C, *S), which may be a meta tensor, is divided between threads, in words."""
    examples, channels = x.size(0), x.size(1)
    sizes = examples, channels, x.numel() // (examples * channels)
    asked = CALL.pack(*[0] * 15, *sizes, is_channels_last(x), 0, 0, torch.get_num_threads(), 0.0, 0.0)
    return ("by channel", "channels in parts", "rows in parts")[compiled(x.dtype).division(asked)]
