"""`bncli.convert`: our batch norms in place of torch's in any model, with the steps that follow them taken in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bncli import kernels
from bncli.engine.convert import graph as fuse_graph
from bncli.engine.convert import patch, tracing
from bncli.engine.convert.guard import Untraceable
from bncli.engine.models import norms as norm

EXACT: dict[type, type[norm.BatchNorm]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
}


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
        left = sum(line.operation is None for line in self.norms)
        fused = [line.operation for line in self.norms if "+" in (line.operation or "")]
        rows = [("batch norm", "runs as", "why not more")]
        for line in self.norms:
            rows.append((line.name or "(the model)", line.operation or "left as it was", line.reason or ""))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows]
        if self.kernel == "native" and fused:
            lines.append("Each is one call; native runs its operations one after the other.")
        elif any("residual add" in operation for operation in fused if operation):
            lines.append("A residual of another shape or dtype is added after the kernel, and the activation with it.")
        total = len(self.norms)
        done = "merged with what follows" if self.kernel == "native" else "fused"
        return "\n".join(
            [f"{total - left} of {total} batch norms on kernel {self.kernel}, {len(fused)} of them {done}", *lines]
        )


def convert(model: nn.Module, kernel: str | kernels.Kernel = "fused", *, fuse: bool = True) -> nn.Module:
    """Run the batch norms of `model` on a kernel, with the activation and the residual add that follow them.

    Works in place and returns the model, as torch.nn.SyncBatchNorm.convert_sync_batchnorm does; what was done to each
    batch norm, and why not more, is `model.bncli_conversion`, a `Conversion` that prints as a table.

    nn.BatchNorm1d, 2d and 3d (and timm's BatchNormAct2d, whose activation is taken in) become bncli's in place: the
    same objects with the same parameters, buffers, hooks, state_dict and training flags, so that optimizers and
    checkpoints made before still serve. SyncBatchNorm, lazy ones and classes with a forward of their own are left, with
    the reason. With `fuse`, each module whose own forward torch.fx can trace gets a forward in which ReLU, LeakyReLU
    (slope 0.01) or SiLU, and a residual add, are the norm's. The module stays the same object of the same class
    (isinstance), with its other methods; one that cannot be traced keeps its forward, and its children are still tried.
    A forward that goes another way in training than in evaluation, or for a list than for a tensor, gets a graph a way.
    A graph of the whole model would take in hardly more and would lose the class, its methods and the children's hooks.

    Convert last, before torch.compile and DistributedDataParallel: a rewritten forward holds the attributes and other
    Python values (configurations, constants of the module's file) that it read at the moment of conversion: a
    `drop_rate` changed later has no effect until convert is called again. A submodule exchanged, added or taken away
    later does have its effect: where a fusion relied on it, the module goes back to its own forward. A hook that is
    later put on a fused activation, or on a module opened because its last layer is a fused norm, does not fire; one
    on a fused norm sees the fused output. Converting again starts afresh, with another kernel or with fuse=False.

    A fused residual add is the kernel's where the residual has the input's shape and dtype; else torch adds, and
    activates, after the kernel. torch.export, torch.compile and torch.jit.trace take a converted model.
    torch.jit.script does not: script the model unconverted. torch.fx.symbolic_trace needs a Tracer whose
    `is_leaf_module` is true for bncli's norms, which are not torch's and so are no leaves by default.

    Raises Unavailable, with the reason, where the kernel cannot run on this machine.
    """
    if isinstance(kernel, str):
        kernels.get(kernel)
    names = {module: name for name, module in model.named_modules()}
    for module in names:
        patch.restore(module)
    left = {module: _swap(module, kernel) for module in names if isinstance(module, _BatchNorm)}
    report = _Report(names, fuse)
    if fuse:
        _fuse_all(model, names, report)
    lines = tuple(report.line(module, reason) for module, reason in left.items())
    model.__dict__["bncli_conversion"] = Conversion(norm.kernel_name(kernel), lines)
    return model


# --- the norms ------------------------------------------------------------------------------------------------------


def _swap(module: nn.Module, kernel: str | kernels.Kernel) -> str | None:
    """Make a batch norm one of ours, in place; or why it was left as it is."""
    if "forward" in module.__dict__:
        return "its forward was replaced on this object"
    activation = None
    if isinstance(module, norm.BatchNorm):
        activation = module.activation
    elif type(module) in EXACT:
        module.__class__ = EXACT[type(module)]
    else:
        reason, activation = _with_activation(module)
        if reason is not None:
            return reason
        module.__class__ = next(EXACT[base] for base in type(module).__mro__ if base in EXACT)
    assert isinstance(module, norm.BatchNorm)
    module.kernel, module.activation = kernel, activation
    return None


def _with_activation(module: nn.Module) -> tuple[str | None, str | None]:
    """For a norm module of another class: why it cannot be ours, or the activation of a BatchNormAct."""
    name = type(module).__name__
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm: its statistics are those of several processes, the kernels' those of one", None
    if isinstance(module, LazyModuleMixin):
        return f"{name}: it has no parameters before its first forward; convert the model after it", None
    if not name.startswith("BatchNormAct") or not any(base in EXACT for base in type(module).__mro__):
        return f"{name} is a class with a forward of its own", None
    parts = dict(module.named_children())
    act = parts.pop("act", nn.Identity())
    if any(type(part) is not nn.Identity for part in parts.values()):
        return f"{name} does more than an activation: {', '.join(parts)}", None
    if any(fuse_graph.has_hooks(part) for part in (*parts.values(), act)):
        return f"the activation of this {name} has hooks", None
    if type(act) is nn.Identity:
        return None, None
    activation = fuse_graph.module_activation(act)
    if activation is None:
        return f"its activation is {type(act).__name__}, which the kernels do not have", None
    return None, activation


# --- the forwards ---------------------------------------------------------------------------------------------------


def _fuse_all(model: nn.Module, names: dict[nn.Module, str], report: _Report) -> None:
    """Rewrite the forwards of all modules that hold batch norms, the inner ones first."""
    opened: set[nn.Module] = set()  # modules whose result is a norm's: what follows them may be taken in
    for module in reversed(list(names)):
        if isinstance(module, _BatchNorm) or not any(isinstance(part, norm.BatchNorm) for part in module.modules()):
            continue
        if type(module).forward is nn.Module.forward:  # an nn.ModuleList
            continue
        try:
            _fuse_one(module, opened, names, report)
        except Untraceable as error:
            report.untraceable[names[module]] = str(error)


def _fuse_one(module: nn.Module, opened: set[nn.Module], names: dict[nn.Module, str], report: _Report) -> None:
    try:
        graphs = tracing.trace(module, opened)
    except Untraceable:
        graphs = tracing.trace(module)  # the opened ones may be to blame
    hooked = fuse_graph.has_hooks(module)
    always = graphs.get(tracing.Course())
    if always is not None and not hooked and fuse_graph.returned_norm(always, module):
        opened.add(module)
    sites = [site for graph in graphs.values() for site in fuse_graph.fuse(graph, module, names[module])]
    fused = [site.target for site in sites if site.fused]
    if fused:
        # Once more, with only those opened that a fusion needs: the others keep their own calls, and so their hooks.
        _rewrite(module, {module.get_submodule(target[:end]) for target in fused for end in _dots(target)})
    why_closed = f"its output leaves {names[module] or 'the model'}, which has hooks" if hooked else None
    for site in sites:
        reason = why_closed if site.returned else site.reason
        report.add(replace(site, target=names[module.get_submodule(site.target)], reason=reason))


def _rewrite(module: nn.Module, opened: set[nn.Module]) -> None:
    graphs = tracing.trace(module, opened)
    called = {target for graph in graphs.values() for target in fuse_graph.targets(graph)}
    fused = {site.target for graph in graphs.values() for site in fuse_graph.fuse(graph, module) if site.fused}
    dropped = called - {target for graph in graphs.values() for target in fuse_graph.targets(graph)}
    holders = {target[:end] for target in called for end in _dots(target)}
    try:
        ways = {course: patch.source_of(graph) for course, graph in graphs.items()}
        patch.install(module, ways, {"", *holders, *fused, *dropped})
    except TypeError as error:
        raise Untraceable(f"cannot be replaced ({error})") from error


def _dots(target: str) -> list[int]:
    return [place for place, letter in enumerate(target) if letter == "."]


class _Report:
    """What the graphs said about each norm, by qualified name."""

    def __init__(self, names: dict[nn.Module, str], fuse: bool) -> None:
        self.names, self.fuse = names, fuse
        self.sites: dict[str, list[fuse_graph.Site]] = {}
        self.untraceable: dict[str, str] = {}

    def add(self, site: fuse_graph.Site) -> None:
        """Take in a call; an outer graph knows more of a norm whose output an inner one returned."""
        known = [other for other in self.sites.get(site.target, []) if not other.returned]
        self.sites[site.target] = [*known, site]

    def line(self, module: nn.Module, left: str | None) -> ConvertedNorm:
        name = self.names[module]
        if left is not None:
            return ConvertedNorm(name, None, left)
        assert isinstance(module, norm.BatchNorm)
        own = (module.activation,) if module.activation else ()
        sites = self.sites.get(name, [])
        calls = tuple(dict.fromkeys((*own, *site.fused) for site in sites)) or (own,)
        reasons = dict.fromkeys(site.reason for site in sites if site.reason)
        unseen = self._unseen(name, bool(sites), module.activation)
        reason = "; ".join(reasons) or (None if any(site.fused for site in sites) else unseen)
        return ConvertedNorm(name, ", ".join(" + ".join(("batch norm", *call)) for call in calls), reason, calls)

    def _unseen(self, name: str, returned: bool, activation: str | None) -> str | None:
        """Why no graph shows what follows a norm."""
        parents = [name[:end] for end in reversed(_dots(name))] + [""]
        for parent in parents:
            if parent in self.untraceable:
                return f"the forward of {parent or 'the model'} {self.untraceable[parent]}"
        if returned:
            return "its output is the model's"
        return "no forward calls it" if self.fuse and name and not activation else None
