"""The graph of one module's own forward, or the reason why no graph can hold it.

torch.fx runs a forward once with stand-ins for tensors and writes down what happens to them. What the forward decides
or does by other means would be frozen at that moment or lost, so such a forward is refused: no graph is better than a
wrong one. Children are single calls in the graph, with their hooks, unless they are to be opened.
"""

from __future__ import annotations

import dis
import functools
import gc
import operator
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

REFUSED_OPERATIONS = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global variable",
    "STORE_SUBSCR": "assigns to an item",
    "SETUP_WITH": "has a with statement",  # Python 3.10
    "BEFORE_WITH": "has a with statement",  # 3.11 to 3.13
    "LOAD_SPECIAL": "has a with statement",  # from 3.14
    "SETUP_FINALLY": "catches exceptions",  # 3.10
    "PUSH_EXC_INFO": "catches exceptions",  # from 3.11
}
REFUSED_GLOBALS = {"type", "hasattr", "print", "globals", "locals"}
REFUSED_MODULES = {"random", "numpy"}
REFUSED_DECORATORS = {"decorate_context", "decorate_autocast", "decorate_fwd"}  # no_grad, autocast and their kind
REFUSED_QUESTIONS = {"is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled"}
CHANGING_METHODS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "clear", "remove"}


class Untraceable(Exception):
    """Why a forward has no graph: a clause whose subject is the forward."""


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
    inside = [module, *(child for child in module.modules() if child in opened)]
    flags = [part.training for part in inside]
    tracers = {training: _Tracer(opened, kind) for training in (True, False)}
    try:
        graphs = {training: _trace_once(module, inside, training, tracers[training]) for training in tracers}
    finally:
        for part, flag in zip(inside, flags, strict=True):
            part.training = flag
    asked = tracers[True].asked | tracers[False].asked
    kinds = tuple((place, kind) for place in sorted(asked))
    if len({graph.python_code("self").src for graph in graphs.values()}) == 1:
        return {Course(None, kinds): graphs[True]}, asked
    if len(inside) > 1:
        raise Untraceable("does something else in training than in evaluation")
    return {Course(training, kinds): graph for training, graph in graphs.items()}, asked


def _trace_once(module: nn.Module, inside: list[nn.Module], training: bool, tracer: _Tracer) -> fx.Graph:
    for part in inside:
        part.training = training
    owned = {id(value) for part in inside for value in part.__dict__.values() if isinstance(value, list | dict | set)}
    try:
        with _watched(owned), _OnlyStandIns():
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
    if _is_users(sys._getframe(1)):
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


def _is_users(frame: FrameType | None) -> bool:
    name = _module_of(frame)
    head = name.partition(".")[0]
    return head != "torch" and head not in sys.stdlib_module_names and name != __name__


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


@contextmanager
def _watched(owned: set[int]) -> Iterator[None]:
    """Look at each call that the traced forward makes before it runs; `owned`: ids of the modules' lists and dicts."""
    profile, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection would run code that is not the forward's
    sys.setprofile(functools.partial(_watch, owned))
    try:
        yield
    finally:
        sys.setprofile(profile)
        if collects:
            gc.enable()


def _watch(owned: set[int], frame: FrameType, event: str, argument: Any) -> None:
    if event == "call":
        if frame.f_code.co_name in REFUSED_DECORATORS:
            raise Untraceable("is decorated with a context manager")
        name = _module_of(frame)
        random_numbers = name.partition(".")[0] in REFUSED_MODULES and _is_users(frame.f_back)
        if name == "torch.utils.checkpoint" or random_numbers:
            raise Untraceable(f"calls {name}.{frame.f_code.co_name}")
        if _is_users(frame):
            reason = _refused_code(frame.f_code)
            if reason is not None:
                raise Untraceable(reason)
    elif event == "c_call" and _is_users(frame):
        _watch_builtin(owned, argument)


def _watch_builtin(owned: set[int], function: Callable[..., Any]) -> None:
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if name in REFUSED_QUESTIONS:
        raise Untraceable(f"asks torch.{name}")
    if isinstance(owner, random.Random) or type(owner).__module__.startswith("numpy"):
        raise Untraceable(f"calls {type(owner).__module__}'s {name}")
    if name in CHANGING_METHODS and id(owner) in owned:
        raise Untraceable("changes an attribute")


@functools.cache
def _refused_code(code: CodeType) -> str | None:
    """Why a function's bytecode cannot be in a graph, or None."""
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self"}
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.opname in REFUSED_OPERATIONS:
            return REFUSED_OPERATIONS[instruction.opname]
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in REFUSED_GLOBALS:
            return f"calls {instruction.argval}"
        if instruction.opname.startswith("LOAD_FAST") and _asks_for_none(instructions[place + 1 : place + 3]):
            loaded = instruction.argval if isinstance(instruction.argval, str) else instruction.argval[-1]
            if loaded in arguments:
                return f"asks whether its argument {loaded} is None"
    return None


def _asks_for_none(after: list[dis.Instruction]) -> bool:
    if not after:
        return False
    jumps = after[0].opname.startswith("POP_JUMP") and after[0].opname.endswith("NONE")
    loads_none = after[0].opname == "LOAD_CONST" and after[0].argval is None
    return jumps or (loads_none and len(after) > 1 and after[1].opname == "IS_OP")
