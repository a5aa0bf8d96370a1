"""The graph of one module's own forward, or the reason why no graph can hold it.

torch.fx runs a forward once with stand-ins for tensors and writes down what happens to them. What the forward decides
or does by other means would be frozen at that moment or lost, so such a forward is refused: no graph is better than a
wrong one. Children are single calls in the graph, with their hooks, unless they are to be opened.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from bncli.engine.convert.guard import Untraceable, is_users, watched


@dataclass(frozen=True)
class Course:
    """When a forward takes one of its ways: in training (None: always), and of what types are which arguments."""

    training: bool | None = None
    kinds: tuple[tuple[int, type], ...] = ()  # position, not counting self, and type

    def holds(self, module: nn.Module, arguments: Sequence[Any]) -> bool:
        if self.training is not None and module.training != self.training:
            return False
        return all(place < len(arguments) and isinstance(arguments[place], kind) for place, kind in self.kinds)


def trace(module: nn.Module, opened: Collection[nn.Module] = ()) -> dict[Course, fx.Graph]:
    """The graphs of `module.forward`, into which the forwards of the `opened` descendants are written out.

    One graph, or one for training and one for evaluation where they differ, and one for an argument that is a tensor
    and one for a list where the forward asks. Raises Untraceable for a forward that a graph cannot hold: control flow
    on values, side effects, context managers, randomness outside modules, other questions about its arguments.
    """
    if "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__:
        raise Untraceable("was replaced on this object")
    graphs, asked = _trace_kind(module, opened, Tensor)
    if asked:
        with suppress(Untraceable):  # then only tensors take a graph's way
            graphs = {**graphs, **_trace_kind(module, opened, list)[0]}
    return graphs


def _trace_kind(
    module: nn.Module, opened: Collection[nn.Module], kind: type
) -> tuple[dict[Course, fx.Graph], set[int]]:
    """The graphs in which arguments that are asked for their type are of this one, and those arguments' places."""
    flag = module.training
    tracers = {training: _Tracer(opened, kind) for training in (True, False)}
    try:
        graphs = {training: _trace_once(module, training, tracer) for training, tracer in tracers.items()}
    finally:
        module.training = flag
    asked = tracers[True].asked | tracers[False].asked
    kinds = tuple((place, kind) for place in sorted(asked))
    if len({graph.python_code("self").src for graph in graphs.values()}) == 1:
        return {Course(None, kinds): graphs[True]}, asked
    return {Course(training, kinds): graph for training, graph in graphs.items()}, asked


def _trace_once(module: nn.Module, training: bool, tracer: _Tracer) -> fx.Graph:
    module.training = training
    try:
        with watched(module), _OnlyStandIns():
            return tracer.trace(module)
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:
        raise Untraceable(f"depends on the values of a tensor ({_first_line(error)})") from error
    except Exception as error:  # the user's code met stand-ins where it expected tensors: anything may be raised
        raise Untraceable(f"raised {type(error).__name__} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message").strip()


class _Tracer(fx.Tracer):
    def __init__(self, opened: Collection[nn.Module], kind: type) -> None:
        super().__init__()
        self.opened, self.kind = opened, kind
        self.asked: set[int] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def type_of(self, node: fx.Node) -> type:
        """What the forward is told about an argument's type, which is noted. Raises Untraceable for any other value."""
        if node.op != "placeholder" or str(node.target).startswith("*"):
            raise Untraceable("asks for the type of what it computed (isinstance)")
        self.asked.add([other for other in self.graph.nodes if other.op == "placeholder"].index(node))
        return self.kind


def _class_of_stand_in(self: Any) -> type:
    # isinstance(x, Tensor) asks an object of another type for its __class__.
    if is_users(sys._getframe(1)):
        kind: type = self.tracer.type_of(self.node)
        return kind
    return _StandIn


class _StandIn(fx.Proxy):
    """fx's stand-in for a tensor, which notes that it is asked what it is, and tells y += x from y = y + x."""

    __class__ = property(_class_of_stand_in)


def in_place(name: str, left: Any, right: Any) -> Any:
    """`left += right` and its kind as a function, by its name in the operator module."""
    return getattr(operator, name)(left, right)


def _recorded(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})

    return method


for _name in [
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]:
    setattr(_StandIn, f"__i{_name}__", _recorded(f"i{_name}"))


class _OnlyStandIns(TorchFunctionMode):
    """Refuses torch functions of real tensors or of none: their results would be frozen into the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _has_stand_in(args) and not _has_stand_in(kwargs):
            raise Untraceable(f"calls {getattr(func, '__name__', func)} on what is not computed from its arguments")
        return func(*args, **(kwargs or {}))


def _has_stand_in(value: Any) -> bool:
    if type(value) is _StandIn or isinstance(value, fx.Proxy):
        return True
    if isinstance(value, list | tuple):
        return any(_has_stand_in(item) for item in value)
    return isinstance(value, dict) and any(_has_stand_in(item) for item in value.values())
