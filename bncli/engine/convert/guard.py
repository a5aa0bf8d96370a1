"""What a forward does, while it is traced, that a graph would freeze or lose; and the reason in words."""

from __future__ import annotations

import dis
import enum
import functools
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from types import CodeType, FrameType, ModuleType
from typing import Any

from torch import nn

REFUSED_OPERATIONS = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global variable",
    "STORE_SUBSCR": "assigns to an item",
    "DELETE_SUBSCR": "deletes an item",
    "SETUP_WITH": "has a with statement",  # Python 3.10
    "BEFORE_WITH": "has a with statement",  # 3.11 to 3.13
    "LOAD_SPECIAL": "has a with statement",  # from 3.14
    "SETUP_FINALLY": "catches exceptions",  # 3.10
    "PUSH_EXC_INFO": "catches exceptions",  # from 3.11
}
REFUSED_GLOBALS = {
    *("type", "hasattr", "callable", "id", "hash"),  # of a stand-in
    *("print", "globals", "locals", "vars", "next", "setattr", "delattr", "open", "exec", "eval"),
}
REFUSED_DECORATORS = {"decorate_context", "decorate_autocast", "decorate_fwd"}  # no_grad, autocast and their kind
REFUSED_QUESTIONS = {"is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled"}
CHANGING_METHODS = {
    *("append", "appendleft", "extend", "extendleft", "insert", "add", "update", "setdefault", "subtract"),
    *("pop", "popleft", "popitem", "clear", "remove", "discard", "sort", "reverse", "rotate"),
}
# Of the standard library, what gives the same result for the same arguments and does nothing else.
PURE_MODULES = {
    *("abc", "builtins", "cmath", "collections", "collections_abc", "copy", "dataclasses", "enum", "functools"),
    *("itertools", "math", "numbers", "operator", "types", "typing"),
}


class Untraceable(Exception):
    """Why a forward has no graph: a clause whose subject is the forward."""


@contextmanager
def watched(root: nn.Module) -> Iterator[None]:
    """Look at each call that the traced forward of `root` makes before it runs, and at what it asks of submodules.

    Raises Untraceable, inside the forward, for what a graph cannot hold.
    """
    profile, collects = sys.getprofile(), gc.isenabled()
    gc.collect(0)  # from here on generation 0 holds what the forward makes, and only that
    gc.disable()  # a collection would run code that is not the forward's
    nn.Module.training = _TrainingFlag(root)  # type: ignore[assignment]
    sys.setprofile(_watch)
    try:
        yield
    finally:
        sys.setprofile(profile)
        del nn.Module.training
        if collects:
            gc.enable()


class _TrainingFlag:
    """module.training, which the forward may ask of its own module alone: the graphs have a way for that flag only."""

    def __init__(self, root: nn.Module) -> None:
        self.root, self.thread = root, threading.get_ident()

    def __get__(self, module: nn.Module, owner: type) -> Any:
        if module is not self.root and threading.get_ident() == self.thread:
            raise Untraceable("asks whether a submodule is in training")
        return module.__dict__["training"]

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


def is_users(frame: FrameType | None) -> bool:
    """Whether a frame runs code of the model's author: not torch's, the standard library's or this rewriting's."""
    name = _module_of(frame)
    head = name.partition(".")[0]
    return head != "torch" and head not in sys.stdlib_module_names and not name.startswith("bncli.engine.convert")


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _watch(frame: FrameType, event: str, argument: Any) -> None:
    if event == "call":
        _watch_call(frame)
    elif event == "c_call" and is_users(frame):
        _watch_builtin(argument)


def _watch_call(frame: FrameType) -> None:
    name, function = _module_of(frame), frame.f_code.co_name
    if function in REFUSED_DECORATORS:
        raise Untraceable("is decorated with a context manager")
    if is_users(frame):
        reason, names = _refused_code(frame.f_code)
        if reason is None and name.partition(".")[0] == "numpy":
            reason = f"calls {name}.{function}"
        if reason is None:
            changing = [known for known in names if _may_change(frame.f_globals.get(known))]
            reason = f"reads {changing[0]}, a global variable that may change" if changing else None
        if reason is not None:
            raise Untraceable(reason)
    elif name == "torch.utils.checkpoint" or (_is_impure(name) and is_users(_caller(frame))):
        raise Untraceable(f"calls {name}.{function}")
    elif is_users(frame.f_back) and frame.f_code.co_argcount:
        _refuse_change(function, frame.f_locals.get(frame.f_code.co_varnames[0]))


def _watch_builtin(function: Callable[..., Any]) -> None:
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    kind = owner if isinstance(owner, type) else type(owner)
    home = owner.__name__ if isinstance(owner, ModuleType) else kind.__module__
    if name in REFUSED_QUESTIONS:
        raise Untraceable(f"asks torch.{name}")
    if isinstance(owner, random.Random) or home.partition(".")[0] == "numpy" or _is_impure(home):
        raise Untraceable(f"calls {home}'s {name}")
    _refuse_change(name, owner)


def _is_impure(module: str) -> bool:
    head = module.partition(".")[0].removeprefix("_")
    return head in sys.stdlib_module_names and head not in PURE_MODULES


def _caller(frame: FrameType) -> FrameType | None:
    """The frame on whose behalf the standard library runs."""
    back = frame.f_back
    while back is not None and _module_of(back).partition(".")[0] in sys.stdlib_module_names:
        back = back.f_back
    return back


def _refuse_change(name: str, owner: Any) -> None:
    """Refuse the change of what the forward did not make itself: it would happen now, and never again."""
    if name not in CHANGING_METHODS or isinstance(owner, type | ModuleType):
        return
    changes = isinstance(owner, MutableSequence | MutableMapping | MutableSet | nn.Module)
    if changes and not any(made is owner for made in gc.get_objects(generation=0)):
        raise Untraceable(f"changes a {type(owner).__name__} that it did not make ({name})")


def _may_change(value: Any) -> bool:
    """Whether a global is a container or an object with attributes: a configuration, not a constant or a function."""
    if isinstance(value, list | dict | set | bytearray):
        return True
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, ModuleType | enum.Enum)


@functools.cache
def _refused_code(code: CodeType) -> tuple[str | None, tuple[str, ...]]:
    """Why a function's bytecode cannot be in a graph, or None; and the names of the globals that it reads."""
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self"}
    instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    names = tuple(dict.fromkeys(each.argval for each in instructions if each.opname == "LOAD_GLOBAL"))
    for place, instruction in enumerate(instructions):
        if instruction.opname in REFUSED_OPERATIONS:
            return REFUSED_OPERATIONS[instruction.opname], names
        if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return "sets a variable of the function around it", names
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in REFUSED_GLOBALS:
            return f"calls {instruction.argval}", names
        if instruction.argval == "__dict__":
            return "reads __dict__", names
        jumps = instruction.opname.startswith("POP_JUMP") and instruction.opname.endswith("NONE")
        if jumps or instruction.opname == "IS_OP":
            reason = _identity(instructions[:place], jumps, arguments)
            if reason is not None:
                return reason, names
    return None, names


def _identity(before: list[dis.Instruction], jumps: bool, arguments: set[str]) -> str | None:
    """Why the `is` after these instructions cannot be in a graph, or None: a stand-in is nothing but itself.

    What self holds may be compared with a constant. `jumps`: the comparison is with None, in a jump.
    """
    constant = None if jumps else before.pop()
    attribute = before[-1].opname == "LOAD_ATTR"
    while before[-1].opname == "LOAD_ATTR":
        before.pop()
    name = before[-1].argval if before[-1].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else None
    name = name[-1] if isinstance(name, tuple) else name
    if constant is None or constant.opname == "LOAD_CONST":
        if attribute and name == "self":
            return None
        if not attribute and name in arguments and (constant is None or constant.argval is None):
            return f"asks whether its argument {name} is None"
    return "asks whether something is the same object (is)"
