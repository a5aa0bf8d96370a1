"""The fused batch norm on a CPU: what calls cpu.c, with the same two functions as triton_launch has for a GPU."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels.fused.build import library
from bncli.kernels.layout import accumulation, is_rows, rows_of_dense, sign_bytes

SOURCE = Path(__file__).with_name("cpu.c")
DEFINITIONS = {torch.float32: "FP32", torch.float64: "FP64", torch.bfloat16: "BF16", torch.float16: "FP16"}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3}
CALL = struct.Struct("15P7q2d")  # struct call of cpu.c

Run = Callable[[bytes], int]


@functools.cache
def _built(dtype: torch.dtype) -> ctypes.CDLL:
    """cpu.c for that element type. Raises Unavailable where it cannot be compiled."""
    built = library(SOURCE, DEFINITIONS[dtype])
    for function in (built.forward, built.backward, built.way):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return built


@functools.cache
def _entry(dtype: torch.dtype) -> tuple[Run, Run]:
    """forward and backward: looking a function up in a library takes longer than a small one runs."""
    return _built(dtype).forward, _built(dtype).backward


@functools.cache
def why_not() -> str | None:
    """Why it cannot run here, or None: it is compiled now if it has not been before."""
    try:
        _entry(torch.float32)
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
    """y like x, the mean and variance (C) that were used, the signs in bits if they are kept. Moves `running`."""
    run, wide = _entry(x.dtype)[0], accumulation(x)
    examples, channels, rows = x.size(0), x.size(1), rows_of_dense(x)
    y = torch.empty_like(x)
    if statistics is None:
        mean, var = x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)
    else:
        mean, var = _widened(statistics[0], wide), _widened(statistics[1], wide)
    signs = x.new_empty(sign_bytes(x), dtype=torch.uint8) if keep_signs else None
    running_mean, running_var, momentum = running or (None, None, 0.0)
    weight, bias = _widened(weight, wide), _widened(bias, wide)
    failed = run(
        CALL.pack(
            x.data_ptr(), _at(residual), 0, y.data_ptr(), 0, 0, _at(weight), _at(bias), _at(mean), _at(var),
            _at(running_mean), _at(running_var), 0, 0, _at(signs),
            examples, channels, x.numel() // (examples * channels), rows,
            ACTIVATIONS[activation], statistics is not None, torch.get_num_threads(), eps, momentum,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError("the fused kernel could not allocate its sums")
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
    given: bool,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dx like x, dweight and dbias (C) in their own dtypes, dresidual like x if it is asked for."""
    run, wide = _entry(x.dtype)[1], accumulation(x)
    examples, channels = x.size(0), x.size(1)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual_gradient else None
    dweight, dbias = x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)
    mean, var = statistics
    mean, var = _widened(mean, wide), _widened(var, wide)
    wide_weight, wide_bias = _widened(weight, wide), _widened(bias, wide)
    failed = run(
        CALL.pack(
            x.data_ptr(), _at(residual), dy.data_ptr(), 0, dx.data_ptr(), _at(dresidual),
            _at(wide_weight), _at(wide_bias), _at(mean), _at(var), 0, 0, dweight.data_ptr(), dbias.data_ptr(),
            _at(signs),
            examples, channels, x.numel() // (examples * channels), is_rows(x), ACTIVATIONS[activation], given,
            torch.get_num_threads(), eps, 0.0,
        )
    )  # fmt: skip
    if failed:
        raise MemoryError("the fused kernel could not allocate its sums")
    if weight is not None and weight.dtype != wide:
        dweight = dweight.to(weight.dtype)
    if bias is not None and bias.dtype != wide:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def way(x: Tensor) -> str:
    """How a dense x (N, C, *S) is cut up, in words. Of a meta tensor too."""
    examples, channels = x.size(0), x.size(1)
    sizes = examples, channels, x.numel() // (examples * channels)
    asked = CALL.pack(*[0] * 15, *sizes, is_rows(x), 0, 0, torch.get_num_threads(), 0.0, 0.0)
    return ("by channel", "channels in parts", "rows in parts")[_built(x.dtype).way(asked)]


def _at(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise RuntimeError(f"x is on the CPU; another tensor of the same batch norm is on {tensor.device}")
    return tensor.data_ptr()


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def _widened(vector: MaybeTensor, wide: torch.dtype) -> MaybeTensor:
    return vector if vector is None or vector.dtype == wide else vector.to(wide)
