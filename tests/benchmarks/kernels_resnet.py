"""A training step of ResNet-50 (He et al. 2015, table 1, with the stride in the 3x3 convolution), native and converted.

Synthetic pictures on the device, channels_last, autocast to bfloat16 over float32 parameters, SGD with momentum.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bncli
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Deadline, Spread, Work
from bncli.results.profile import Case
from tests.benchmarks.kernels_check import CANDIDATES, Check

STEP_TARGET, MEMORY_TARGET = 1.15, 0.75
WARM_UP_STEPS = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with its batch norm, and the shortcut added before the last ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, classes). The default is ResNet-50: 53 batch norms."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Bottleneck(inputs, width * 2**stage, 2 if block == 0 and stage > 0 else 1))
                inputs = 4 * width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.stages(x).mean((2, 3)))


@dataclass(frozen=True)
class Setting:
    """What is trained on what. `small`: a toy of the same kind, for a machine without a GPU."""

    batch: int
    pixels: int
    small: bool

    def model(self, device: torch.device) -> ResNet:
        torch.manual_seed(0)
        made = ResNet((1, 1, 1, 1), 8, 10) if self.small else ResNet()
        return made.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def data(self, device: torch.device) -> tuple[Tensor, Tensor]:
        source = torch.Generator(device).manual_seed(1)
        x = torch.randn(self.batch, 3, self.pixels, self.pixels, generator=source, device=device)
        labels = torch.randint(10, (self.batch,), generator=source, device=device)
        return x.contiguous(memory_format=torch.channels_last), labels


@dataclass(frozen=True)
class Steps:
    """Times of training steps in ms by arm; what the device's allocator held at most for an arm, its model included, in
    bytes; how long an arm took to get ready, compilation included; why one could not be run.
    """

    samples_ms: dict[str, tuple[float, ...]]
    peak_bytes: dict[str, int | None]
    warm_up_s: dict[str, float]
    failed: dict[str, str]

    def over(self, reference: str, arm: str) -> Spread:
        return timing.times_faster(self.samples_ms[reference], self.samples_ms[arm])

    def memory_ratio(self, reference: str, arm: str) -> float | None:
        base, own = self.peak_bytes[reference], self.peak_bytes[arm]
        return None if base is None or own is None else own / base


def norm_cases(setting: Setting) -> list[Case]:
    """The distinct batch norms of the full-sized network with what is fused into them, in bfloat16, channels_last."""
    size, found = setting.pixels // 2, []

    def add(channels: int, operation: str, pixels: int) -> None:
        found.append(Case((setting.batch, channels, pixels, pixels), operation, "bf16", "channels_last"))

    add(64, "bn+relu", size)
    size //= 2
    for stage in range(4):
        width = 64 * 2**stage
        add(width, "bn+relu", size)  # of the first 1x1 convolution, before the stride
        size = size if stage == 0 else size // 2
        add(width, "bn+relu", size)
        add(4 * width, "bn", size)
        add(4 * width, "bn+add+relu", size)
    return list(dict.fromkeys(found))


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(x).float(), labels)


def converted(model: nn.Module, candidate: str) -> nn.Module:
    return bncli.convert(model, kernel=CANDIDATES[candidate], trace=True)


def gradients_agree(setting: Setting, candidate: str, device: torch.device) -> Check:
    """The converted network's gradients, in bfloat16, are at most twice as far from float32's as native's are.

    The distance is the l2 norm over all parameters, relative. TF32 is off for the float32 reference.
    """
    x, labels = setting.data(device)
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    found = []
    base = setting.model(device)
    for convert, autocast in ((False, False), (False, True), (True, True)):
        model: nn.Module = copy.deepcopy(base)
        model = converted(model, candidate) if convert else model
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            loss = loss_of(model, x, labels, autocast)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        found.append((loss.item(), torch.cat([g.flatten().double() for g in grads])))
    (loss32, exact), (loss_native, native), (loss_own, own) = found
    size = float(exact.norm())
    native_error, error = float((native - exact).norm()) / size, float((own - exact).norm()) / size
    detail = f"off by {error:.3g}, native's by {native_error:.3g}; "
    detail += f"loss {loss_own:.4f}, native's {loss_native:.4f}, in float32 {loss32:.4f}"
    return Check("ResNet's gradients", f"batch {setting.batch}", error <= 2 * native_error, detail)


def trainer(model: nn.Module, x: Tensor, labels: Tensor, compiled: bool) -> Callable[[], None]:
    """One training step of the model, as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        loss_of(forward, x, labels, autocast=True).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    setting: Setting,
    candidate: str,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    with_compile: bool,
    deadline: Deadline,
    compile_s: float = 60.0,
) -> Steps:
    """Each arm made ready and its memory read in turn, then steps of all of them interleaved.

    The compiled arms are left out when less than `compile_s`, about what each of them takes, is left.
    """
    x, labels = setting.data(device)
    found = Steps({}, {}, {}, {})
    works: dict[str, Work] = {}
    torch.compiler.reset()
    for compiled in (False, True)[: 2 if with_compile else 1]:
        for own in ("native", candidate):
            name = f"{own}, compiled" if compiled else own
            if compiled and deadline.left_s < compile_s:
                found.failed[name] = "no time was left to compile it"
                continue
            before_bytes, began_s = _settled_bytes(device), time.perf_counter()
            try:
                model: nn.Module = setting.model(device)
                step = trainer(model if own == "native" else converted(model, own), x, labels, compiled)
                for _ in range(WARM_UP_STEPS):
                    step()
            except Exception as error:  # the other arms' figures stand
                found.failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
                continue
            found.peak_bytes[name] = _peak_bytes(step, device, before_bytes)
            found.warm_up_s[name] = time.perf_counter() - began_s
            works[name] = Work(lambda _, step=step: step())  # type: ignore[misc]
    found.samples_ms.update(timing.interleaved(clock, works, rounds, deadline=deadline))
    return found


def _peak_bytes(step: Callable[[], None], device: torch.device, before_bytes: int) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before_bytes


def _settled_bytes(device: torch.device) -> int:
    """Allocated now, with nothing waiting to be collected: what the other arms keep between their steps."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)
