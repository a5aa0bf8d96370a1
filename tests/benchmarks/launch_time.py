"""Host time of the fused kernel's launches on a GPU, through Triton's binder and without it. No GPU is needed.

    python -m tests.benchmarks.launch_time

Triton compiles for sm_90, and everything of its launch runs but the driver: its functions do nothing, and the tensors
are the CPU's. What PyTorch's autograd and the driver take comes on top of both columns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bncli.kernels.fused import triton as device_kernels
from bncli.kernels.fused import triton_launch
from bncli.kernels.fused.tiling import Processors

SHAPES = ((60, 100), (32, 16, 28, 28), (32, 64, 56, 56))  # the last one has teams, whose barrier needs counters
ROUNDS, CALLS = 40, 100


class Driver:
    """A driver of one H200 that starts nothing. It keeps the arguments of the last launch."""

    last: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 128, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.last = arguments


def calls(shape: tuple[int, ...]) -> tuple[Callable[[], object], Callable[[], object]]:
    """forward, and forward + backward, of batch norm with ReLU that updates running statistics."""
    x, dy = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    weight, bias, mean, var = torch.ones(4, shape[1] + -shape[1] % 4)[
        :, : shape[1]
    ].unbind()  # at multiples of 16 bytes

    def forward() -> tuple[Tensor, ...]:
        running = (mean, var, 0.1)
        return triton_launch.forward(x, weight, bias, None, None, 1e-5, "relu", False, running=running)

    def both() -> object:
        _, *statistics, _ = forward()
        return triton_launch.backward(dy, x, weight, bias, None, statistics, None, 1e-5, "relu", False, False)

    return forward, both


def through_binder(yes: bool, call: Callable[[], object]) -> object:
    triton_launch.COMPILED = not yes
    return call()


def microseconds(call: Callable[[], object], binder: bool, calls: int = CALLS) -> float:
    start = time.thread_time_ns()
    for _ in range(calls):
        through_binder(binder, call)
    return (time.thread_time_ns() - start) / calls / 1e3


def main(rounds: int = ROUNDS) -> int:
    if device_kernels.INTERPRETED:
        raise SystemExit("Triton's interpreter is on in this process; unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    driver.set_active(Driver())
    triton_launch.processors = lambda device: Processors(132, cooperative=True)  # type: ignore[assignment]
    print(f"lowest CPU time of {rounds} x {CALLS} interleaved calls, driver faked; torch {torch.__version__}")
    for shape in SHAPES:
        for name, call in zip(("forward", "forward + backward"), calls(shape), strict=True):
            samples: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for binder, found in samples.items():
                    found.append(microseconds(call, binder))
            old, new = min(samples[True]), min(samples[False])
            print(
                f"{shape!s:18} {name:18} binder {old:6.1f} us, without {new:6.1f} us, ratio {new / old:.2f}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
