"""Events of the profiler, folded to classes: exactly, with made-up events, and on a real step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli import convert
from bncli.errors import UsageError
from bncli.kernels import native
from bncli.measure.profile.step_time import (
    DATA,
    STEP,
    class_of,
    fold,
    has_layers,
    scaled,
    shares_ms,
    write_trace,
)
from bncli.results.profile import STEP_CLASSES
from tests.resnet import ResNet

CPU = torch.device("cpu")


@dataclass
class Kernel:
    name: str
    duration: float


@dataclass
class Event:
    name: str
    self_cpu_time_total: float = 0.0
    cpu_parent: Any = None
    kernels: list[Kernel] = field(default_factory=list)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::native_batch_norm", "normalization"),
        ("aten::cudnn_batch_norm_backward", "normalization"),
        ("autograd::engine::evaluate_function: NativeBatchNormBackward0", "normalization"),
        ("CudnnBatchNormBackward0", "normalization"),
        ("aten::native_group_norm", "normalization"),
        ("NativeLayerNormBackward0", "normalization"),
        ("FusedBatchNorm", "normalization"),
        ("autograd::engine::evaluate_function: FusedBatchNormBackward", "normalization"),
        ("bncli::fused_batch_norm", "normalization"),
        ("bncli::fused_batch_norm_backward", "normalization"),
        ("aten::conv2d", "convolution, linear"),
        ("aten::_convolution", "convolution, linear"),
        ("aten::mkldnn_convolution", "convolution, linear"),
        ("ConvolutionBackward0", "convolution, linear"),
        ("aten::addmm", "convolution, linear"),
        ("AddmmBackward0", "convolution, linear"),
        ("aten::relu_", "activation"),
        ("aten::threshold_backward", "activation"),
        ("LeakyReluBackward1", "activation"),
        ("SiluBackward0", "activation"),
        ("Optimizer.step#SGD.step", "optimizer"),
        ("Optimizer.zero_grad#AdamW.zero_grad", "optimizer"),
        (DATA, "data"),
        ("aten::cross_entropy_loss", "loss"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("NllLossBackward0", "loss"),
        ("aten::_softmax", None),  # of an attention
        ("aten::resolve_conj", None),
        ("aten::add", None),
        ("aten::norm", None),
        ("torch::autograd::AccumulateGrad", None),
    ],
)
def test_an_operator_is_known_by_its_name_forward_and_backward(name: str, expected: str | None) -> None:
    assert class_of(name) == expected


def test_each_self_time_counts_once_in_the_class_around_it() -> None:
    step = Event(STEP, 5)
    fetch = Event(DATA, 1, step)
    norm = Event("aten::batch_norm", 2, step)
    inner = Event("aten::native_batch_norm", 30, norm)
    optimizer = Event("Optimizer.step#SGD.step", 3, step)
    events = [
        step,
        fetch,
        Event("aten::mm", 7, fetch),  # an augmentation: data, whatever it consists of
        norm,
        inner,
        Event("aten::empty", 4, inner),
        optimizer,
        Event("aten::mm", 11, optimizer),
        Event("aten::max_pool2d", 13, step),
        Event("aten::gelu", 17, step),
        Event("aten::_log_softmax", 19, step),
        Event("aten::empty", 1000),  # outside of every step
    ]
    assert fold(events, device_time=False) == {
        "normalization": 36,
        "convolution, linear": 0,
        "activation": 17,
        "loss": 19,
        "optimizer": 14,
        "data": 8,
        "other": 13,
        "gaps": 5,
    }


def test_on_a_device_its_kernels_count_and_not_the_hosts_time() -> None:
    step = Event(STEP, 500, kernels=[Kernel(STEP, 999), Kernel("triton_poi", 3)])  # the range, and a launch of its own
    events = [
        step,
        Event("aten::conv2d", 40, step, [Kernel("implicit_gemm", 20)]),
        Event("NativeBatchNormBackward0", 10, None, [Kernel("bn_bw", 5), Kernel("bn_reduce", 2)]),  # another thread
    ]
    found = fold(events, device_time=True)
    assert found["convolution, linear"] == 20
    assert found["normalization"] == 7
    assert found["other"] == 3
    assert sum(found.values()) == 30


def test_on_a_cpu_the_classes_are_scaled_to_sum_to_the_median() -> None:
    total = {**dict.fromkeys(STEP_CLASSES, 0.0), "normalization": 3000.0, "gaps": 1000.0}
    found = scaled(total, steps=2, median_ms=1.0, device_time=False)
    assert found["normalization"] == pytest.approx(0.75)
    assert found["gaps"] == pytest.approx(0.25)


def test_on_a_device_the_gaps_are_the_rest_of_the_median() -> None:
    total = {**dict.fromkeys(STEP_CLASSES, 0.0), "normalization": 3000.0}
    assert scaled(total, 2, 5.0, device_time=True)["gaps"] == pytest.approx(3.5)
    assert scaled(total, 2, 1.0, device_time=True)["normalization"] == pytest.approx(1.0)
    assert scaled(total, 2, 1.0, device_time=True)["gaps"] == 0


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 8, 8))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_real_step_has_time_in_every_class_and_sums_to_the_median() -> None:
    model, optimizer = small()

    def step() -> None:
        with torch.profiler.record_function(DATA):
            x = torch.randn(16, 3, 8, 8)
        loss = nn.functional.cross_entropy(model(x), torch.zeros(16, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found = shares_ms(step, 2, 10.0, CPU)
    assert tuple(found) == STEP_CLASSES
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(10.0)


def test_a_forward_pass_alone_has_no_optimizer() -> None:
    model, _ = small()
    found = shares_ms(lambda: model(torch.ones(16, 3, 8, 8)), 2, 1.0, CPU)
    assert found["optimizer"] == found["data"] == 0
    assert found["convolution, linear"] > 0


def test_a_trace_is_a_json_file_that_names_each_run(tmp_path: Path) -> None:
    model, _ = small()
    x = torch.ones(16, 3, 8, 8)
    write_trace(tmp_path / "trace.json", {"one, native": lambda: model(x), "one, fused": lambda: model(x)}, CPU)
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert "one, native" in names
    assert "one, fused" in names
    assert "aten::conv2d" in names


def traced(path: Path, *models: nn.Module) -> list[dict[str, Any]]:
    """The events of one step of each model."""
    x, y = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)

    def step_of(model: nn.Module) -> Callable[[], object]:
        return lambda: nn.functional.cross_entropy(model(x), y).backward()

    write_trace(path, {f"run {k}": step_of(model) for k, model in enumerate(models)}, CPU, models)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_a_trace_names_the_layers_of_a_resnet_with_operations_in_place_forward_and_backward(tmp_path: Path) -> None:
    model, ours = ResNet((1, 1), 4, 2), convert(ResNet((1, 1), 4, 2), native.batch_norm)
    names = Counter(event.get("name") for event in traced(tmp_path / "trace.json", model, ours))
    for name in ("conv1 (Conv2d)", "stages.0.bn1 (BatchNorm2d)", "stages.1.downsample.0 (Conv2d)", "fc (Linear)"):
        assert names[name] == 2
        assert names[f"{name}, backward"] >= 2
    assert names["maxpool (MaxPool2d), backward"] == 2
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


def test_a_batch_norm_takes_along_what_follows_in_a_trace_too(tmp_path: Path) -> None:
    model = convert(ResNet((1, 1), 4, 2), trace=True)
    names = {event.get("name") for event in traced(tmp_path / "trace.json", model)}
    assert "stages.0.bn1 (BatchNorm2d)" in names
    assert not any("relu" in str(name).lower() and "(ReLU)" not in str(name) for name in names)


def test_a_node_of_the_backward_pass_is_of_the_innermost_layer_that_made_it(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x * 2).exp()

    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Identity(), Twice(), nn.Flatten(), nn.Linear(1800, 2))
    events = [event for event in traced(tmp_path / "trace.json", model) if event.get("ph") == "X"]
    evaluated, inside = "autograd::engine::evaluate_function: ", dict[str, list[str]]()
    for node in sorted((each for each in events if each["name"].startswith(evaluated)), key=lambda each: each["ts"]):
        ends = node["ts"] + node["dur"]
        held = [each for each in events if node["ts"] <= each["ts"] and each["ts"] + each["dur"] <= ends]
        (layer,) = [each["name"] for each in held if each["name"].endswith(", backward")] or ["none"]
        inside.setdefault(layer, []).append(node["name"].removeprefix(evaluated))
    sums = "torch::autograd::AccumulateGrad"
    assert inside["0 (Conv2d), backward"] == ["ConvolutionBackward0", sums, sums]
    assert "1 (Identity), backward" not in inside
    assert inside["2 (Twice), backward"] == ["ExpBackward0", "MulBackward0"]
    assert inside["2.act (ReLU), backward"] == ["ReluBackward0"]
    assert sorted(inside["4 (Linear), backward"]) == sorted(["AddmmBackward0", sums, "TBackward0", sums])
    assert inside["none"] == ["NllLossBackward0", "LogSoftmaxBackward0"]


def test_the_layers_of_a_compiled_model_have_no_names_in_a_trace() -> None:
    model, _ = small()
    assert has_layers(model)
    assert not has_layers(torch.compile(model))  # type: ignore[arg-type]
    assert not has_layers(nn.Sequential(torch.compile(model)))  # type: ignore[arg-type]
    model.compile()
    assert not has_layers(model)


def test_a_trace_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^trace .*missing"):
        write_trace(tmp_path / "missing" / "trace.json", {"one": lambda: None}, CPU)
