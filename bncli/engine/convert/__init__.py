"""`bncli.convert`: our batch norms in place of torch's in any model, with the add and activation that follow them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from bncli import kernels
from bncli.engine.convert import blocks, graph
from bncli.engine.models import norms
from bncli.errors import UsageError

EXACT: dict[type, Any] = {getattr(nn, f"BatchNorm{n}d"): getattr(norms, f"BatchNorm{n}d") for n in (1, 2, 3)}
EXACT[nn.SyncBatchNorm] = norms.BatchNorm


@dataclass(frozen=True)
class ConvertedNorm:
    """One batch norm of the model: what runs in its place, and why not more."""

    name: str  # qualified, as in the state_dict
    operation: str | None  # "batch norm + residual add + relu"; None: left as it was
    reason: str | None  # why nothing more was fused, or why it was left
    calls: tuple[tuple[str, ...], ...] = ()  # the operations that follow it in one call, for each different call


@dataclass(frozen=True)
class Conversion:
    """What `convert` did to each batch norm of a model; as text, a table."""

    kernel: str
    norms: tuple[ConvertedNorm, ...]

    def __str__(self) -> str:
        rows = [("batch norm", "runs as", "why not more")]
        for line in self.norms:
            rows.append((line.name or "(the model)", line.operation or "left as it was", line.reason or ""))
        lines = aligned(rows)
        ours = sum(line.operation is not None for line in self.norms)
        fused = [operation for _, operation, _ in rows if "+" in operation]
        if self.kernel == "native" and fused:
            lines.append("Each is one call; native runs its operations one after the other.")
        elif any("residual add" in operation for operation in fused):
            lines.append("A residual of another shape or dtype is added after the kernel, and the activation with it.")
        total = f"{ours} of {len(self.norms)} batch norms run on kernel {self.kernel}: "
        total += f"{len(fused)} together with the operations that follow, {ours - len(fused)} alone"
        return "\n".join([total, *lines])


def aligned(rows: list[tuple[str, str, str]]) -> list[str]:
    """A table's rows as lines of text."""
    first, second = (max(len(row[column]) for row in rows) for column in range(2))
    return [f"{name:{first}}  {what:{second}}  {reason}".rstrip() for name, what, reason in rows]


def convert(
    model: nn.Module,
    kernel: str | kernels.Kernel = "fused",
    *,
    fuse: bool = True,
    trace: bool = False,
    sync: bool = False,
) -> nn.Module:
    """Run the batch norms of a model on a kernel, with the residual add and the activation that follow them.

    Works in place and returns the model. nn.BatchNorm1d, 2d and 3d, and timm's BatchNormAct2d with its activation,
    become bncli's: the same objects with the same parameters, buffers, hooks, state_dict and flags, so that optimizers
    and checkpoints still serve. Lazy ones, classes with a forward of their own and, without `sync`, SyncBatchNorm stay.

    A norm takes along what follows it in an nn.Sequential (ReLU, LeakyReLU with slope 0.01, SiLU) and in residual
    blocks whose forward is, word for word, that of torchvision's BasicBlock or Bottleneck. These modules become objects
    of a subclass of their class. Each call looks at their modules anew, so that whatever is changed later (a slope, a
    module, a hook, a flag) has its effect; what cannot be fused runs as it is written.

    With `trace`, torch.fx looks into the other forwards too. The model is converted in place all the same; what is
    returned is a torch.fx.GraphModule that shares its modules and has its state_dict. It has the limits of fx: the
    Python of the forwards that hold norms ran while it was made, so that attributes and configurations are those of
    that moment; methods other than forward are gone; of modules that are changed later, and of hooks, only those have
    an effect whose modules the graph calls: norms, activations, and whatever holds no norms or had hooks before.

    Convert last, before torch.compile and DistributedDataParallel. Converting a model again starts afresh.
    torch.export, torch.compile and torch.jit.trace take a converted model; torch.jit.script does not.

    Args:
        model: Any module.
        kernel: native, fused, fused-interpreted, or a function with the arguments that bncli.kernels describes.
        fuse: Whether norms take along what follows them.
        trace: Whether to fuse a graph of the whole model as well.
        sync: Training normalizes by the statistics of all ranks' examples, as bncli.batch_norm says. Norms of bncli
            that do so already go on in any case.

    Returns:
        The model, or its graph. `bncli_conversion` of either is a `Conversion`: what was done to each norm and why not
        more, which prints as a table.

    Raises:
        Unavailable: With the reason, where the kernel cannot run on this machine.
        UsageError: With the reason, where torch.fx cannot hold the model, or where it is or has such a graph already.
    """
    graphs = [part.graph for part in model.modules() if isinstance(part, fx.GraphModule)]
    if any(node.target is blocks.run_norm for made in graphs for node in made.nodes):
        raise UsageError("it is or has a graph that convert made; convert the model itself again", field="model")
    if isinstance(kernel, str):
        kernels.get(kernel)
    traced = graph.trace(model) if fuse and trace else None
    modules = dict(model.named_modules())
    for module in modules.values():
        module.__class__ = blocks.original_class(module)
    found = [(name, each, _swap(each, kernel, sync)) for name, each in modules.items() if isinstance(each, _BatchNorm)]
    for module in modules.values():
        holds_norms = any(isinstance(part, norms.BatchNorm) for part in module.modules())
        if fuse and holds_norms and not parametrize.is_parametrized(module):  # whose class comes and goes
            module.__class__ = blocks.fused_class(module.__class__)
    unseen = "the forward that calls it is none that convert knows; trace=True looks into it" if fuse else None
    report = _report(kernel, found, blocks.sites(model), unseen)
    model.__dict__["bncli_conversion"] = report
    if traced is None:
        return model
    report = _report(kernel, found, graph.fuse(traced), "the graph does not call it")
    traced.meta["_user_preserved_attributes"] = {"bncli_conversion": report}  # what copies of a GraphModule keep
    traced.__dict__["bncli_conversion"] = report
    return traced


def _swap(module: Any, kernel: str | kernels.Kernel, sync: bool) -> str | None:
    """Make a batch norm one of ours, in place; or why it was left as it is."""
    kind, name = type(module), type(module).__name__
    has_activation = kind.__module__.startswith("timm.") and name == "BatchNormAct2d"
    if "forward" in module.__dict__:
        return "its forward was replaced on this object"
    if isinstance(module, nn.SyncBatchNorm) and not (sync and module.process_group in (None, dist.group.WORLD)):
        return "SyncBatchNorm: its statistics are those of several processes; sync=True takes the default group's"
    if isinstance(module, LazyModuleMixin):
        return f"{name}: it has no parameters before its first forward; convert the model after it"
    if not isinstance(module, norms.BatchNorm):
        if kind not in EXACT and not has_activation:
            return f"{name} is a class with a forward of its own"
        activation = blocks.activation_name(module.act) if has_activation else None
        for part in module.children() if has_activation else ():  # besides `act` mostly Identity
            taken = activation is not None and part is module.act
            if not taken and (type(part) is not nn.Identity or not blocks.is_plain(part)):
                return blocks.describe(part, "a part of its own")
        module.__class__, module.activation = EXACT[nn.BatchNorm2d if has_activation else kind], activation
    if module.kernel is norms.ignoring_statistics:
        return "its gradient ignores the batch's statistics, which every kernel's takes into account"
    module.kernel, module.sync = kernel, module.sync or sync
    return None


def _report(kernel: Any, found: list[Any], sites: Iterable[blocks.Site], unseen: str | None) -> Conversion:
    """What was done to each norm: `found` has name, norm and why it was left, `unseen` why it has no sites."""
    calls = defaultdict(list)
    for norm, *call in sites:
        calls[norm].append(call)
    lines = []
    for name, norm, left in found:
        if left is not None:
            lines.append(ConvertedNorm(name, None, left))
            continue
        fused = [call for call in calls[norm] if call[0]] or calls[norm][:1] or [[(), unseen]]
        if norm.activation:
            fused = [[(norm.activation,), None]]
        operations: Any = tuple(dict.fromkeys(each for each, _ in fused))
        reason = "; ".join(dict.fromkeys(str(each) for _, each in fused if each))
        text = ", ".join(" + ".join(("batch norm", *each)) for each in operations)
        lines.append(ConvertedNorm(name, text, reason or None, operations))
    return Conversion(norms.kernel_name(kernel), tuple(lines))
