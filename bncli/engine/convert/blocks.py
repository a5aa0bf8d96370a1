"""Forwards of nn.Sequential and of residual blocks in which a batch norm takes along the add and activation after it.

Nothing is decided in advance: each call asks whether norm, residual and activation are what the kernels take, and
otherwise runs what the original forward says, always in its order. Whatever is changed later has its effect.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from bncli.engine.models.norms import BatchNorm
from bncli.kernels import native
from bncli.names import ACTIVATIONS, FUSED_ACTIVATIONS

ACTIVATION_MODULES = {getattr(nn, ACTIVATIONS[name].module): ACTIVATIONS[name] for name in FUSED_ACTIVATIONS}
# How adds are written. In place they keep the dtype of the left, and refuse a right that would make it larger.
ADDS: dict[str, Callable[[Any, Any], Any]] = {
    "y + r": operator.add,
    "r + y": lambda y, r: r + y,
    "y += r": operator.iadd,
    "r += y": lambda y, r: operator.iadd(r, y),
}
CLOSED = "it has hooks, which must see its own output, or is called with more than its input"
Site = tuple[Any, tuple[str, ...], str | None]  # a norm of ours, what it takes along in a call, and why not more


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing more: no hooks, no forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None  # by module.compile()
    return not any(hooks) and not replaced and not _has_any_global_hook()


def is_open_norm(module: Any) -> bool:
    """Whether a module is a batch norm of ours that may take along what follows it."""
    ours = isinstance(module, BatchNorm) and type(module).forward is BatchNorm.forward
    return ours and module.activation is None and is_plain(module)


def activation_name(activation: Any) -> str | None:
    """The kernels' name of an activation, a module or that name; None where they lack it or where hooks must see it."""
    if isinstance(activation, str):
        return activation
    row = ACTIVATION_MODULES.get(type(activation))
    if row is None or getattr(activation, "negative_slope", None) != row.slope or not is_plain(activation):
        return None
    return row.name


def describe(module: Any, name: str) -> str:
    """The reason why a norm does not take along the module that follows it."""
    if module is None:
        return "nothing follows it here"
    slope = f" with slope {module.negative_slope}" if isinstance(module, nn.LeakyReLU) else ""
    hooks = ", which has hooks" if isinstance(module, nn.Module) and not is_plain(module) else ""
    return f"what follows is {name} ({type(module).__name__}{slope}){hooks}"


@fx.wrap  # a call of it stays one where fx traces a converted model
def run_norm(norm: Any, x: Tensor, activation: Any = None, residual: Any = None, add: str | None = None) -> Tensor:
    """activation(norm(x) + residual), in one call where the kernels take it.

    norm: a module, or None where x is normalized already. activation: a module, a name of FUSED_ACTIVATIONS or None.
    add: one of ADDS, of y = norm(x) and the residual r; None: there is none.
    """
    name = activation_name(activation)
    if is_open_norm(norm) and (add is None or _alike(x, residual, add)):
        y = norm(x, residual, name)
    else:
        y, name = x if norm is None else norm(x), None
        y = y if add is None else ADDS[add](y, residual)
    if name is not None or activation is None:
        return y
    return native.ACTIVATIONS[activation](y) if isinstance(activation, str) else activation(y)


def _alike(x: Tensor, residual: Any, add: str) -> bool:
    """Whether the kernels' sum is that of the add: of one shape and dtype, in the layout of its first operand."""
    alike = isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype
    return alike and (add != "r + y" or residual.stride() == x.stride())


class Parts(NamedTuple):
    """What a forward computes, activation(body(x) + shortcut(x)), by the modules that it has at this moment."""

    body: Iterable[Any]  # modules that run one after the other
    add: str | None = None  # one of ADDS, or None where nothing is added
    shortcut: Iterable[Any] = ()  # modules that run after the body; none: x itself is added
    activation: Any = None


def _leaves(modules: Iterable[Any]) -> list[Any]:
    """The modules in the order of their calls, those of an inner Sequential in its place."""
    found: list[Any] = []
    for module in modules:
        kind: Any = type(module)
        forward = getattr(kind, "forward", None)  # there is none where a function is called in place of a module
        forward = kind.bncli_original.forward if forward is _sequential else forward
        found += _leaves(module) if forward is SEQUENTIAL and is_plain(module) else [module]
    return found


def _run(modules: Iterable[Any], x: Tensor) -> tuple[Any, Tensor]:
    """x through modules; and the batch norm that ends them, which is still to be applied, or None."""
    norm = None
    for module in modules:
        if norm is not None:
            name = activation_name(module)
            x, norm = norm(x, None, name), None
            if name is not None:
                continue
        if is_open_norm(module):
            norm = module
        else:
            x = module(x)
    return norm, x


def _parts(module: Any) -> Parts | None:
    """The parts of a module with a fused forward; None for others, and where the forward was replaced since."""
    kind = type(module)
    known = getattr(kind, "bncli_known", None)
    return kind.bncli_parts(module) if known is not None and kind.bncli_original.forward is known else None


def _forward(self: Any, x: Tensor) -> Tensor:
    parts = _parts(self)
    if parts is None:
        return type(self).bncli_original.forward(self, x)
    body, add, shortcut, activation = parts
    norm, y = _run(_leaves(body), x)
    if add is None:
        return run_norm(norm, y)
    shortcut = _leaves(shortcut)
    if not shortcut:
        return run_norm(norm, y, activation, x, add)
    is_new, y = norm is not None, run_norm(norm, y)
    norm, residual = _run(shortcut, x)
    if norm is not None and (is_new or add == "y + r"):  # where y is new, the add writes into nothing that is seen
        return run_norm(norm, residual, activation, y, "r + y" if add == "y + r" else "r += y")
    return run_norm(None, y, activation, run_norm(norm, residual), add)


def _sequential(self: Any, input: Tensor) -> Tensor:
    return _forward(self, input)


def sites(model: nn.Module, name: str = "") -> Iterator[Site]:
    """Where the fused forwards of a model's modules call norms, those of outer modules first; `name` is the model's."""
    names: dict[Any, str] = {module: path for path, module in model.named_modules(prefix=name)}
    for parts in filter(None, map(_parts, names)):
        body, shortcut = _leaves(parts.body), _leaves(parts.shortcut)
        called = [*body, *shortcut]
        for norm, follower in itertools.zip_longest(called, called[1:]):
            adds = parts.add is not None and follower is None
            adds = adds and (not shortcut or parts.add == "y + r" or is_open_norm(body[-1]))
            follower = parts.activation if adds else follower
            taken = None if follower in shortcut[:1] else activation_name(follower)
            if is_open_norm(norm):
                reason = None if taken else describe(follower, names.get(follower, ""))
                yield norm, ("residual add",) * adds + ((taken,) if taken else ()), reason
            elif isinstance(norm, BatchNorm):
                yield norm, (), CLOSED


# The forwards of torchvision's ResNet and of bncli.engine.models, as `_text` gives them.
RESNET_BLOCK = """def forward(self, x):
    {residual} = x
    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)
    out = self.conv2(out)
    out = self.bn2(out){third}
    if self.downsample is not None:
        {residual} = self.downsample(x)
    out += {residual}
    out = self.relu(out)
    return out"""
THIRD = """
    out = self.relu(out)
    out = self.conv3(out)
    out = self.bn3(out)"""
OWN_RESIDUAL = """def forward(self, x):
    y: Tensor = self.activation(self.body(x) + self.shortcut(x))
    return y"""


def _basic_block(block: Any, *more: Any) -> Parts:
    shortcut = [] if block.downsample is None else [block.downsample]
    return Parts([block.conv1, block.bn1, block.relu, block.conv2, block.bn2, *more], "y += r", shortcut, block.relu)


def _bottleneck(block: Any) -> Parts:
    return _basic_block(block, block.relu, block.conv3, block.bn3)


SEQUENTIAL = nn.Sequential.forward
KNOWN: dict[Any, Callable[[Any], Parts]] = {
    SEQUENTIAL: Parts,
    OWN_RESIDUAL: lambda block: Parts([block.body], "y + r", [block.shortcut], block.activation),
}
for _name in ("identity", "residual"):  # its name in torchvision, and before 0.3
    KNOWN[RESNET_BLOCK.format(residual=_name, third="")] = _basic_block
    KNOWN[RESNET_BLOCK.format(residual=_name, third=THIRD)] = _bottleneck


def _text(function: Any) -> str:
    """A function's code without docstring, annotations and comments, or nothing."""
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        tree.body = tree.body[ast.get_docstring(tree) is not None :]
    except (OSError, SyntaxError, TypeError):  # no source to read, or not that of one function
        return ""
    for annotated in tree.args.args:
        annotated.annotation = None
    tree.returns = None
    return "" if hasattr(function, "__wrapped__") else ast.unparse(tree)


@functools.cache
def fused_class(original: Any) -> Any:
    """A subclass of a module's class with a fused forward; that class itself where its forward is not known."""
    parts: Any = KNOWN.get(original.forward) or KNOWN.get(_text(original.forward))
    if parts is None or original.__new__ is not object.__new__:  # as FSDP's, which counts the bases of its objects
        return original

    class Fused(original):
        bncli_original, bncli_parts, bncli_known = original, staticmethod(parts), staticmethod(original.forward)
        forward = _sequential if original.forward is SEQUENTIAL else _forward

        def __reduce_ex__(self, protocol: Any) -> Any:
            """What pickle and copy ask for. No name leads to this class: it is made anew."""
            make, arguments, *rest = super().__reduce_ex__(max(int(protocol), 2))
            return _rebuild, (original, make, *(original if each is Fused else each for each in arguments)), *rest

    return functools.update_wrapper(Fused, original, updated=())


def original_class(module: nn.Module) -> Any:
    """The class that an object had before it got that of `fused_class`."""
    return type(module).__dict__.get("bncli_original", type(module))


def _rebuild(original: Any, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    module = make(*arguments)
    module.__class__ = fused_class(original)
    return module
