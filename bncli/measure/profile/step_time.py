"""Breakdown of a step's time: the events of torch.profiler, summed into STEP_CLASSES.

An operator counts with its self time, so that nothing counts twice: on a CPU its wall time less that of the operators
inside it, on a GPU the time of the device's kernels that it launched itself. It belongs to the innermost operator
around it whose class is known, forward by name and backward by its autograd node's; what runs under the optimizer or
while a batch is fetched belongs there whole. What is left is `gaps`: on a CPU the interpreter's time between
operators, on a GPU the time in which the device is idle.

A fused norm runs its ReLU and its residual add itself: they are normalization in its row, and activation and other in
native's. The count of batches that a native norm keeps is other. What torch.compile fused is other. The loss of a
small net is few operators, but on cores that other programs use its threads wait for each other, for most of the step.

A profiled step takes up to twice as long as a plain one, because each event costs time. Of a CPU all classes are
therefore scaled alike, so that they sum to the median step, which was measured without; steps of many small operators
remain shifted towards the classes with most of them. Device times on a GPU are not stretched: there the gaps are the
median less them, and only where they are more than the median (kernels side by side) are they scaled down to it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from bncli.engine.device import synchronize
from bncli.errors import UsageError
from bncli.results.profile import STEP_CLASSES

STEP, DATA = "bncli: step", "bncli: data"  # the ranges that a step marks
ACTIVATIONS = {
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish"),
    *("clamp_min", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
    "threshold",
}
PRODUCTS = {"addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "einsum", "linear", "matmul", "mm", "mv"}
WHOLE = ("optimizer", "data")  # whatever runs inside


class Event(Protocol):
    """What is read of a torch.autograd.profiler_util.FunctionEvent; times in microseconds."""

    name: str
    cpu_parent: Any  # another such event, or None
    kernels: Any  # those of the device that it launched: each with a name and a duration

    @property
    def self_cpu_time_total(self) -> float: ...


@functools.cache
def class_of(name: str) -> str | None:
    """Of an event by its name, one of STEP_CLASSES; None for one that belongs to what is around it."""
    if name == DATA:
        return "data"
    if name.startswith("Optimizer."):
        return "optimizer"
    operator = _operator(name)
    if re.search("(batch|layer|group|instance|rms)_?norm", operator):
        return "normalization"
    if operator in ACTIVATIONS:
        return "activation"
    if operator.removeprefix("mkldnn_") in PRODUCTS or re.search(r"conv(olution|_|\d|$)", operator):
        return "convolution, linear"
    if re.search("log_softmax|cross_entropy|_loss", operator):
        return "loss"
    return None


def _operator(name: str) -> str:
    """`autograd::engine::evaluate_function: NativeBatchNormBackward0`, `aten::relu_` -> native_batch_norm, relu."""
    last = re.split(r": |::", name)[-1]
    node = re.fullmatch(r"(\w+?)Backward\d*", last)
    if node is not None:
        last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node[1])
    return last.lower().strip("_").removesuffix("_backward")


def fold(events: Iterable[Event], device_time: bool) -> dict[str, float]:
    """Class -> microseconds. `gaps` holds the time of the steps themselves, and is 0 with device times."""
    total = dict.fromkeys(STEP_CLASSES, 0.0)
    for event in events:
        found = _class_around(event)
        if device_time:  # a range has a kernel of its name and length besides those that it really launched
            launched = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
            total[found if found not in (None, "gaps") else "other"] += launched
        elif found is not None:
            total[found] += event.self_cpu_time_total
    return total


def _class_around(event: Event) -> str | None:
    """The class of an event by those around it; None for one of unknown class outside of every step."""
    if event.name == STEP:
        return "gaps"
    found, above = None, event
    while above is not None and above.name != STEP:
        name = class_of(above.name)
        if name in WHOLE or (found is None and name is not None):
            found = name
        above = above.cpu_parent
    return found or (None if above is None else "other")


def scaled(total_us: Mapping[str, float], steps: int, median_ms: float, device_time: bool) -> dict[str, float]:
    """Class -> milliseconds of a step, which sum to `median_ms`, from the microseconds of `steps` profiled steps."""
    each_ms = {name: us / 1e3 / steps for name, us in total_us.items()}
    whole = sum(each_ms.values())
    if device_time and whole <= median_ms:
        return each_ms | {"gaps": median_ms - whole}
    return {name: ms * median_ms / whole if whole else 0.0 for name, ms in each_ms.items()}


# --- the profiled pass --------------------------------------------------------------------------------------------


def shares_ms(step: Callable[[], object], steps: int, median_ms: float, device: torch.device) -> dict[str, float]:
    """Class -> milliseconds of a step. `step` marks where it fetches its batch by `record_function(DATA)`.

    Empty for a device that the profiler does not know.
    """
    if device.type not in ("cpu", "cuda"):
        return {}
    cuda = device.type == "cuda"
    events = recorded({STEP: step}, steps, device).events() or []
    return scaled(fold(events, cuda), steps, median_ms, cuda)


def recorded(runs: Mapping[str, Callable[[], object]], times: int, device: torch.device) -> profile:
    """A profile of each run, `times` over, in a range of its name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to the terminal; read at its first start
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        for name, run in runs.items():
            for _ in range(times):
                with record_function(name):
                    run()
                    synchronize(device)
    return found


# --- the trace ----------------------------------------------------------------------------------------------------


def write_trace(
    path: Path, runs: Mapping[str, Callable[[], object]], device: torch.device, models: Iterable[nn.Module] = ()
) -> None:
    """Write the Chrome trace of one of each run, one after the other in one file (chrome://tracing, Perfetto).

    It names the layers of `models` that do not run compiled. Raises UsageError where the file cannot be written.
    """
    with _layer_ranges(filter(has_layers, models)):
        found = recorded(runs, 1, device)
    try:
        path.touch()
        found.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be written: {reason}", field="trace", value=path) from error


def has_layers(model: nn.Module) -> bool:
    """Whether layers run one by one, so that a trace can name them: torch.compile merges them."""
    return not any(part._compiled_call_impl or "_orig_mod" in part._modules for part in model.modules())


@contextlib.contextmanager
def _layer_ranges(models: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, the forward of each module and its nodes of the backward pass run in ranges of its name and class.

    A node is of the innermost module in whose forward it was made. Its hooks leave the graph as it is; a module's full
    backward hooks change it, and refuse operations in place. A module's forward hooks would keep its batch norm from
    taking along what follows, so that the call itself is replaced.
    """
    named = set[Any]()  # nodes

    def traced(call: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        seen = {*_nodes((args, kwargs))}
        with record_function(name):
            output = call(*args, **kwargs)
        pending = _nodes(output)
        while pending:
            if (node := pending.pop()) in seen:
                continue
            if node not in named:
                running = list[Any]()
                node.register_prehook(functools.partial(_enter, running, f"{name}, backward"))
                node.register_hook(lambda *_, running=running: running.pop().__exit__(None, None, None))
            seen.add(node)
            named.add(node)
            pending += [below for below, _ in node.next_functions if below is not None]
        return output

    modules = dict.fromkeys((path, module) for model in models for path, module in model.named_modules())
    for path, module in modules:
        name = f"{path} ({type(module).__name__})".strip()
        module.__dict__["_call_impl"] = functools.partial(traced, module._call_impl, name)
    try:
        yield
    finally:
        for _, module in modules:
            module.__dict__.pop("_call_impl", None)


def _enter(running: list[Any], name: str, *_: Any) -> None:
    running.append(record_function(name))
    running[-1].__enter__()


def _nodes(value: Any) -> list[Any]:
    """The nodes of the backward pass that made the tensors in a value."""
    return [each.grad_fn for each in tree_leaves(value) if isinstance(each, torch.Tensor) and each.grad_fn is not None]
