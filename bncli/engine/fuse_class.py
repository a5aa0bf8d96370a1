"""A module's forward replaced by a graph's, in place: a subclass of the object's own class, made for that graph.

The object, its submodules, its state_dict, its hooks and its other methods stay; isinstance still holds; copying and
pickling work, because the graph's source travels with the object instead of the class.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import itertools
import linecache
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

from bncli.engine.fuse_trace import Course

_numbers = itertools.count()


@dataclass(frozen=True)
class Source:
    """A forward as text, and the names it needs: (name, module) and (name, object that pickles by reference)."""

    code: str
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]


Ways = tuple[tuple[Course, Source], ...]


def source_of(graph: fx.Graph) -> Source:
    """The graph as Python, with a forward's signature."""
    python = graph.python_code("self")
    used = set(re.findall(r"\w+", python.src))
    names = {name: value for name, value in python.globals.items() if name in used}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, ModuleType)}
    objects = {name: value for name, value in names.items() if name not in modules}
    return Source(python.src, tuple(modules.items()), tuple(objects.items()))


def install(module: nn.Module, ways: dict[Course, Source]) -> None:
    """Make `ways` the forward of this one object. Raises TypeError where its class takes no subclass in its place."""
    original: Any = type(module)
    module.__class__ = rewritten(original, tuple(ways.items()))


def restore(module: nn.Module) -> None:
    """Give the object the class, and so the forward, that it had before `install`."""
    original = type(module).__dict__.get("bncli_original")
    if original is not None:
        module.__class__ = original


@functools.cache
def rewritten(original: Any, ways: Ways) -> Any:
    """A subclass of `original` whose forward takes the first of `ways` that holds, and else the original's.

    The same class for the same arguments.
    """
    functions = tuple((course, _compiled(original.__qualname__, source)) for course, source in ways)

    def choose(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        for course, function in functions:
            if course.holds(self, arguments):
                return function(self, *arguments, **options)
        return original.forward(self, *arguments, **options)

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__init__": _init,
            "__reduce_ex__": _reduce,
            "bncli_original": original,
            "bncli_ways": ways,
            "forward": functions[0][1] if ways[0][0] == Course() else choose,
        },
    )


def _compiled(owner: str, source: Source) -> Any:
    file = f"<bncli.convert {owner} {next(_numbers)}>"
    names: dict[str, Any] = {name: importlib.import_module(module) for name, module in source.modules}
    names.update(source.objects)  # and no __name__: torch.compile would look the names up in the module of that name
    linecache.cache[file] = (len(source.code), None, source.code.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(source.code, file, "exec"), names)
    return names["forward"]


def _made(module: Any) -> Any:
    """The class that `rewritten` made, of an object of it or of a subclass."""
    return next(kind for kind in type(module).__mro__ if "bncli_original" in kind.__dict__)


def _init(self: Any, *arguments: Any, **options: Any) -> None:
    """A new object, as a slice of an nn.Sequential is, has other submodules: it gets the original class."""
    self.__class__ = _made(self).bncli_original
    self.__init__(*arguments, **options)


def _reduce(self: Any, protocol: Any) -> Any:
    made = _made(self)
    reduced = super(made, self).__reduce_ex__(protocol)
    if made is not type(self) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced  # a class with a way of its own to be copied
    return (_rebuild, (made.bncli_original, made.bncli_ways), *reduced[2:])


def _rebuild(original: Any, ways: Ways) -> nn.Module:
    made: nn.Module = object.__new__(original)
    made.__class__ = rewritten(original, ways)
    return made
