"""Peak memory of a kernel's forward and backward pass, and of a training step with its parts.

On a GPU the peak is the allocator's. On a CPU it is the resident set's, in a fresh process that does nothing else. A
kernel's process runs a tiny case first, so that neither lazily loaded code nor the heap's free pages count. A step's
peak is that of making the model and training it for two steps, so torch itself and the batch are not in it; what torch
loads or compiles for the first step is, as in a training run.

torch is loaded by the functions that those processes run: the server may load it while the program does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses
from bncli.results.profile import Case, StepMemory

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from bncli.engine.data.splits import Batch, Dataset
    from bncli.measure.profile.step_models import StepModel
    from bncli.measure.profile.timed_kernels import Source
    from bncli.measure.reference.case import Inputs

    Values = Tensor | np.ndarray

KERNEL_LIMIT_S, STEP_LIMIT_S = 20.0, 120.0  # of one case, of one model
STEPS = 2  # the optimizer's state is there from the end of the first on
MEASURED = sys.platform == "linux"  # of a kernel on a CPU


# --- a kernel ---------------------------------------------------------------------------------------------------------


def kernel_processes() -> FreshProcesses:
    """A server for `kernel_peak_mib`, not yet started."""
    return FreshProcesses(prepare_for_kernels)


def kernel_peak_mib(processes: FreshProcesses, case: Case, kernel: str, allow_code: bool) -> float:
    """The peak of forward and backward beyond the inputs on a CPU, in MiB. Raises CallFailed with the reason."""
    if not MEASURED:
        raise CallFailed("the peak of resident memory is read on Linux only")
    found: float = processes.call(kernel_peak_here, case, kernel, allow_code, limit_s=KERNEL_LIMIT_S)
    return found


def tiny(case: Case) -> Case:
    """A case of the same kind whose code is the same, and whose tensors are a few KiB."""
    return replace(case, shape=(2, min(case.shape[1], 16), *[min(side, 2) for side in case.shape[2:]]))


def prepare_for_kernels() -> None:
    """In the server: load torch, and run native once, which takes 0.3 s the first time."""
    import torch

    torch.set_num_threads(1)
    _run_tiny(Case((2, 2), dtype="fp32"), "native", allow_code=False)


def kernel_peak_here(case: Case, kernel: str, allow_code: bool) -> float | None:
    """The peak of one case in the process that calls this. Raises what the kernel raises."""
    import torch

    from bncli.measure.reference.case import timed
    from bncli.measure.timing.memory import give_back_free_pages, peak_mib

    source = _run_tiny(tiny(case), kernel, allow_code)
    step = source(timed(case)).step(_resident_inputs(case))
    give_back_free_pages()
    return peak_mib(step, torch.device("cpu"))


def _run_tiny(case: Case, kernel: str, allow_code: bool) -> Source:
    """Run one step, which loads and compiles what the kernel needs. Returns its source."""
    import torch

    from bncli.measure.profile.sources import sources
    from bncli.measure.reference.case import timed

    source = sources([kernel], torch.device("cpu"), allow_code)[kernel]
    source(timed(case)).step(_resident_inputs(case))()
    return source


def _resident_inputs(case: Case) -> Inputs:
    """Tensors of a case whose pages are all resident. Their values do not matter for memory."""
    import torch

    from bncli.measure.reference import case as cases

    def of(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return torch.ones(case.shape[1], dtype=t.dtype)
        return cases.with_layout(torch.ones(case.shape, dtype=t.dtype), case.layout)

    return cases.timed_inputs(cases.timed(tiny(case)), torch.device("cpu")).each(of)


# --- a training step --------------------------------------------------------------------------------------------------


def prepare_for_steps() -> None:
    """In the server: load torch and all that a child needs. What a child loads itself would be missing in its peak."""
    import torch

    import bncli.measure.profile.step_models
    import bncli.measure.timing.memory  # noqa: F401

    torch.set_num_threads(1)  # a thread of the server would not survive the fork


def step_memory(
    processes: FreshProcesses, model: StepModel, kernel: str | None, batch: Batch, classes: int
) -> StepMemory:
    """The memory of a model made for it and trained on that batch, on the batch's device.

    processes: a server with `prepare_for_steps`. Raises CallFailed, with the reason.
    """
    import torch

    x, y = batch
    if x.device.type != "cpu":
        return step_memory_here(model, kernel, x, y, classes)
    # As arrays, since a tensor is received with code of torch's that would be missing in the peak.
    arguments = (model, kernel, x.numpy(), y.numpy(), classes, torch.get_num_threads())
    found: StepMemory = processes.call(step_memory_here, *arguments, limit_s=STEP_LIMIT_S)
    return found


def step_memory_here(
    model: StepModel, kernel: str | None, x: Values, y: Values, classes: int, threads: int | None = None
) -> StepMemory:
    """`step_memory` in the current process."""
    import torch

    from bncli.measure.profile.step_models import one_batch
    from bncli.measure.timing.memory import peak_mib

    if threads is not None:
        torch.set_num_threads(threads)
    dataset, parts = one_batch(torch.as_tensor(x), torch.as_tensor(y), classes), dict[str, float]()
    device = dataset.train.index_device
    peak = peak_mib(lambda: parts.update(_train(model, kernel, dataset, device)), device)
    return StepMemory(**parts, peak_mib=peak)


def _train(model: StepModel, kernel: str | None, dataset: Dataset, device: torch.device) -> dict[str, float]:
    """The parts of StepMemory, in MiB, after STEPS steps of a new model.

    Activations are the storages of tensors that autograd saved for backward and that are no parameters: the input among
    them, and under autocast the parameters' copies in the narrower dtype.
    """
    from bncli.measure.timing.memory import MIB, saved_mib

    trainable = model.trainable(kernel, dataset, device)
    batch = trainable.batch()
    for _ in range(STEPS - 1):
        trainable.step(*batch)
    parameters = list(trainable.model.parameters())
    activations = saved_mib(lambda: trainable.step(*batch), leave_out=parameters)
    state = [value for values in trainable.optimizer.state.values() for value in values.values()]
    tensors: dict[str, Sequence[Tensor]] = {
        "parameters_mib": parameters,
        "gradients_mib": [p.grad for p in parameters if p.grad is not None],
        "optimizer_mib": [value for value in state if hasattr(value, "element_size")],
    }
    mib = {name: sum(t.numel() * t.element_size() for t in each) / MIB for name, each in tensors.items()}
    return mib | {"activations_mib": activations}
