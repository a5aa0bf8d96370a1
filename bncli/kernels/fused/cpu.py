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
from bncli.kernels.layout import accumulation, is_channels_last, refuse_gaps, sign_bytes, sizes

SOURCE = Path(__file__).with_name("cpu.cpp")
DEFINITIONS = {torch.float32: "FP32", torch.float64: "FP64", torch.bfloat16: "BF16", torch.float16: "FP16"}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3}
CALL = struct.Struct("15P7q2d")  # struct call of cpu.cpp
NO_MEMORY = "the fused kernel could not allocate its sums"

Run = Callable[[bytes], int]


class Compiled(NamedTuple):
    """The functions of cpu.cpp for one element type, looked up once since that takes longer than a small call."""

    forward: Run
    backward: Run
    division: Run


@functools.cache
def compiled(dtype: torch.dtype) -> Compiled:
    """cpu.cpp compiled for that element type. Raises Unavailable if it cannot be compiled."""
    from bncli.kernels.fused.build import library  # here, so that `python -m` can run that module as the main one

    found = library(SOURCE, DEFINITIONS[dtype])
    functions = Compiled(found.forward, found.backward, found.division)
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int  # type: ignore[attr-defined]
    return functions


@functools.cache
def node() -> Callable[..., tuple[Tensor, Tensor, Tensor] | None] | None:
    """The function of node.cpp, or None unless `python -m bncli.kernels.fused.build` has compiled it here."""
    from bncli.kernels.fused import build

    try:
        if (found := build.node()) is None:
            return None
        functions = compiled(torch.float32)
    except Unavailable:
        return None
    made = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p)(("node", found))
    return made(functions.forward, functions.backward)


@functools.lru_cache(maxsize=4096)
def geometry(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int, bool]:
    """(N, C, S, whether it is channels last) of a tensor. Raises ValueError if it is neither that nor contiguous."""
    x = torch.empty_strided(shape, strides, device="meta")
    channels_last = is_channels_last(x)
    if not (channels_last or x.is_contiguous()):
        refuse_gaps(x)
    return *sizes(x), channels_last


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
    run, wide, shape = compiled(x.dtype).forward, accumulation(x), geometry(x.shape, x.stride())
    y, signs = torch.empty_like(x), x.new_empty(sign_bytes(x), dtype=torch.uint8) if keep_signs else None
    if statistics is None:
        mean, var = x.new_empty(shape[1], dtype=wide), x.new_empty(shape[1], dtype=wide)
    else:
        mean, var = statistics[0].to(wide), statistics[1].to(wide)
    running_mean, running_var, momentum = running or (None, None, 0.0)
    if weight is not None and weight.dtype != wide:  # a conversion to the same dtype takes half a microsecond
        weight = weight.to(wide)
    if bias is not None and bias.dtype != wide:
        bias = bias.to(wide)
    arguments = CALL.pack(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), 0, y.data_ptr(), 0, 0,
        0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        mean.data_ptr(), var.data_ptr(), 0 if running_mean is None else running_mean.data_ptr(),
        0 if running_var is None else running_var.data_ptr(), 0, 0, 0 if signs is None else signs.data_ptr(),
        *shape, ACTIVATIONS[activation], statistics is not None, torch.get_num_threads(), eps, momentum,
    )  # fmt: skip
    if run(arguments):
        raise MemoryError(NO_MEMORY)
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
    run, wide, shape = compiled(x.dtype).backward, accumulation(x), geometry(x.shape, x.stride())
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if residual_gradient else None
    dweight, dbias = x.new_empty(shape[1], dtype=wide), x.new_empty(shape[1], dtype=wide)
    mean, var = statistics
    if mean.dtype != wide or var.dtype != wide:
        mean, var = mean.to(wide), var.to(wide)
    wide_weight = weight if weight is None or weight.dtype == wide else weight.to(wide)
    wide_bias = bias if bias is None or bias.dtype == wide else bias.to(wide)
    arguments = CALL.pack(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), dy.data_ptr(), 0, dx.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(), 0 if wide_weight is None else wide_weight.data_ptr(),
        0 if wide_bias is None else wide_bias.data_ptr(), mean.data_ptr(), var.data_ptr(), 0, 0, dweight.data_ptr(),
        dbias.data_ptr(), 0 if signs is None else signs.data_ptr(),
        *shape, ACTIVATIONS[activation], frozen, torch.get_num_threads(), eps, 0.0,
    )  # fmt: skip
    if run(arguments):
        raise MemoryError(NO_MEMORY)
    if weight is not None and weight.dtype != wide:
        dweight = dweight.to(weight.dtype)
    if bias is not None and bias.dtype != wide:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def thread_division(x: Tensor) -> str:
    """How the work on a dense x (N, C, *S), which may be a meta tensor, is divided between threads, in words."""
    asked = CALL.pack(*[0] * 15, *geometry(x.shape, x.stride()), 0, 0, torch.get_num_threads(), 0.0, 0.0)
    return ("by channel", "channels in parts", "rows in parts")[compiled(x.dtype).division(asked)]
