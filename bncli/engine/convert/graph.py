"""Which activation and which residual add of a graph go into the batch norm before them, and why the others cannot.

Patterns: norm -> activation, norm -> add -> activation, norm -> add. A step is taken in only when nothing else uses
what it replaces and when no write into a tensor stands between.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bncli.engine.convert import alias
from bncli.engine.convert.tracing import in_place
from bncli.engine.models.norms import BatchNorm
from bncli.names import ACTIVATIONS, FUSED_ACTIVATIONS, Activation

FUSED = [ACTIVATIONS[name] for name in FUSED_ACTIVATIONS]
ACTIVATION_MODULES: dict[type, Activation] = {getattr(nn, row.module): row for row in FUSED}
# The functions, in place too, and the names of the methods.
ACTIVATION_FUNCTIONS: dict[Any, Activation] = {
    spelled if owner is Tensor else getattr(owner, spelled): row
    for row in FUSED
    for spelled in (row.name, f"{row.name}_")
    for owner in (F, torch, Tensor)
    if hasattr(owner, spelled)
}
OTHER_ACTIVATIONS = {
    *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu6"),
    *("rrelu", "selu", "sigmoid", "softplus", "softsign", "tanh", "threshold"),
}
ADDS = {operator.add, torch.add, "add", "add_", in_place}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def module_activation(module: nn.Module) -> str | None:
    """The name of the activation that a module is, where kernels apply it; else None."""
    row = ACTIVATION_MODULES.get(type(module))
    return row.name if row is not None and getattr(module, "negative_slope", None) == row.slope else None


@dataclass(frozen=True)
class Site:
    """One call of a batch norm: what it does now, or why it does not do more."""

    target: str  # path of the norm from the graph's module
    fused: tuple[str, ...] = ()  # of "residual add" and FUSED_ACTIVATIONS
    reason: str | None = None
    returned: bool = False  # its output is the module's: whoever calls the module may have more to say


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind, None) for kind in HOOKS)


def targets(graph: fx.Graph) -> set[str]:
    """The paths of the submodules that a graph calls."""
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def returned_norm(graph: fx.Graph, root: nn.Module) -> bool:
    """Whether the graph's result is that of a batch norm which could still take in what follows."""
    fuser = _Fuser(graph, root)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return isinstance(result, fx.Node) and len(result.users) == 1 and fuser.norm_before(result) is not None


def fuse(graph: fx.Graph, root: nn.Module, name: str = "") -> list[Site]:
    """Fuse in place what can be fused in the graph of `root`, whose qualified name is `name`.

    Returns a Site for every call of a batch norm of ours.
    """
    fuser = _Fuser(graph, root, name)
    calls = [node for node in graph.nodes if fuser.is_norm_call(node)]
    for node in reversed(list(graph.nodes)):  # the last add of a chain first: it is the one before the activation
        fuser.take_add(node)
    for node in calls:
        fuser.take_activation(node)
    graph.lint()
    return [fuser.site(node) for node in calls]


class _Fuser:
    def __init__(self, graph: fx.Graph, root: nn.Module, name: str = "") -> None:
        self.graph, self.root, self.prefix = graph, root, f"{name}." if name else ""
        self.fused: dict[fx.Node, tuple[str, ...]] = {}
        self.reasons: dict[fx.Node, str] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_norm_call(self, node: fx.Node) -> bool:
        """A plain call of a batch norm of ours that has no activation yet."""
        module = self.module(node)
        plain = len(node.args) == 1 and not node.kwargs
        return isinstance(module, BatchNorm) and module.activation is None and plain

    def norm_before(self, node: Any) -> fx.Node | None:
        """The norm whose output `node` is, through Identity modules, or None; each output used once."""
        while isinstance(node, fx.Node) and len(node.users) == 1:
            module = self.module(node)
            if self.is_norm_call(node) and node not in self.fused:
                return None if module is None or has_hooks(module) else node
            if type(module) is not nn.Identity or has_hooks(module):
                return None
            node = node.args[0]
        return None

    def user(self, node: fx.Node) -> fx.Node | None:
        """The only user of a node's output, through Identity modules."""
        while len(node.users) == 1:
            (node,) = node.users
            module = self.module(node)
            if type(module) is not nn.Identity or has_hooks(module):
                return node
        return None

    # --- activations --------------------------------------------------------------------------------------------

    def activation(self, node: fx.Node | None) -> str | None:
        """The kernel's name of the activation that a node is, or None."""
        if node is None or not node.all_input_nodes:
            return None
        module = self.module(node)
        if module is not None:
            if has_hooks(module):
                return None
            return module_activation(module)
        row = ACTIVATION_FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        if row is None:
            return None
        if row.slope is None:
            return row.name
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", row.slope)
        return row.name if slope == row.slope else None

    def take_activation(self, norm: fx.Node) -> None:
        follower = self.user(norm)
        name = self.activation(follower)
        module = self.module(norm)
        if norm in self.fused or name is None or follower is None or module is None or has_hooks(module):
            return
        norm.kwargs = {"activation": name}
        self.fused[norm] = (name,)
        self._replace(follower, norm)

    # --- residual adds ------------------------------------------------------------------------------------------

    def take_add(self, add: fx.Node) -> None:
        if add.op not in ("call_function", "call_method") or add.target not in ADDS:
            return
        operands = add.args[1:] if add.target is in_place else add.args
        if len(operands) != 2 or (add.target is in_place and add.args[0] != "iadd"):
            return
        left, right = operands
        norms = {norm: other for node, other in ((left, right), (right, left)) if (norm := self.norm_before(node))}
        # Of two norms the one on the main branch: after more layers than the shortcut's.
        for norm in sorted(norms, key=self._depth, reverse=True):
            residual = norms[norm]
            reason = self._why_not_add(add, norm, left, residual)
            if reason is None:
                assert isinstance(residual, fx.Node)
                self._take_add(add, norm, residual)
                for other in norms.keys() - {norm}:
                    self.reasons[other] = f"it is the residual of {self.prefix}{norm.target}"
                return
            self.reasons[norm] = reason

    def _why_not_add(self, add: fx.Node, norm: fx.Node, left: Any, residual: Any) -> str | None:
        if left is residual and self.norm_before(left) is norm:
            return "its output is added to itself"
        if not isinstance(residual, fx.Node):
            return f"what is added is the constant {residual}"
        if residual.op == "get_attr":
            return f"what is added is {self.prefix}{residual.target}, a parameter or a buffer"
        if set(add.kwargs) - {"alpha"} or add.kwargs.get("alpha", 1) != 1:
            return "the add scales its operand (alpha)"
        writes = add.target in (in_place, "add_") and self.norm_before(left) is not norm
        if writes and not alias.is_own(left, self.root):
            return "the add writes into its other operand"
        nodes = list(self.graph.nodes)
        between = nodes[nodes.index(norm) + 1 : nodes.index(add)]
        moves = residual in between  # then the norm must wait for its residual
        if moves and any(node.target == norm.target for node in between):
            return "it is called again before the residual is known"
        if alias.may_write(between, norm.args[0] if moves else residual, self.root):
            return "a tensor that it needs may be written to before the add"
        return None

    def _take_add(self, add: fx.Node, norm: fx.Node, residual: fx.Node) -> None:
        nodes = list(self.graph.nodes)
        if nodes.index(residual) > nodes.index(norm):
            add.prepend(norm)
        follower = self.user(add)
        name = self.activation(follower)
        norm.kwargs = {"residual": residual} if name is None else {"residual": residual, "activation": name}
        self.fused[norm] = ("residual add",) if name is None else ("residual add", name)
        if name is not None and follower is not None:
            self._replace(follower, add)
        self._replace(add, norm)

    def _replace(self, last: fx.Node, norm: fx.Node) -> None:
        """Let `norm` give what `last` gave, and drop `last` and the Identity modules before it."""
        chain = [last]
        for node in chain:
            chain += [source for source in node.all_input_nodes if type(self.module(source)) is nn.Identity]
        last.replace_all_uses_with(norm, delete_user_cb=lambda user: user is not norm)
        for node in chain:
            if not node.users:
                self.graph.erase_node(node)

    def _depth(self, node: fx.Node) -> int:
        """The number of nodes on the longest way to this one."""
        depths: dict[fx.Node, int] = {}
        for earlier in self.graph.nodes:
            depths[earlier] = 1 + max((depths[source] for source in earlier.all_input_nodes), default=0)
            if earlier is node:
                break
        return depths[node]

    # --- words --------------------------------------------------------------------------------------------------

    def site(self, norm: fx.Node) -> Site:
        target = str(norm.target)
        if norm in self.fused:
            fused = self.fused[norm]
            left = None if fused[-1] != "residual add" else self._why_not_activation(norm)
            return Site(target, fused, left)
        module = self.module(norm)
        if module is not None and has_hooks(module):
            return Site(target, (), "it has hooks, which must see its own output")
        users = list(norm.users)
        if len(users) > 1:
            others = [user for user in users if user.target not in ADDS and self.activation(user) is None] or users[1:]
            return Site(target, (), f"its output is also used by {', '.join(map(self._name, others))}")
        if norm in self.reasons:
            return Site(target, (), self.reasons[norm])
        follower = self.user(norm)
        if follower is not None and follower.op == "output":
            return Site(target, (), None, returned=True)
        return Site(target, (), self._why_not_activation(norm))

    def _why_not_activation(self, norm: fx.Node) -> str | None:
        follower = self.user(norm)
        if follower is None or follower.op == "output":
            return "its output is not used" if not norm.users else None
        module = self.module(follower)
        name = type(module).__name__ if module is not None else self._name(follower)
        if module is not None and self.activation(follower) is None and has_hooks(module):
            return f"{self._name(follower)} has hooks, which must see its own input and output"
        if module is not None and type(module).__module__ == "torch.nn.modules.activation":
            slope = f" with slope {module.negative_slope}" if isinstance(module, nn.LeakyReLU) else ""
            return f"the activation is {name}{slope}, which the kernels do not have"
        if name.rstrip("_") in OTHER_ACTIVATIONS:
            return f"the activation is {name}, which the kernels do not have"
        return f"what follows is {self._name(follower)}"

    def _name(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return f"{self.prefix}{node.target} ({type(module).__name__})"
        if node.op == "output":
            return "the caller"
        if node.target is getattr:
            return f".{node.args[1]}"
        if node.target is in_place:
            return str(node.args[0])
        return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
