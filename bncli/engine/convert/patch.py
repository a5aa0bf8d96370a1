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
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

from bncli.engine.convert.tracing import Course

_numbers = itertools.count()


@dataclass(frozen=True)
class Source:
    """A forward as text, and the names it needs: (name, module) and (name, object that pickles by reference)."""

    code: str
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]


Ways = tuple[tuple[Course, Source], ...]
Structure = tuple[tuple[tuple[str, ...], type, tuple[str, ...]], ...]  # path, class and names of the children of each


def source_of(graph: fx.Graph) -> Source:
    """The graph as Python, with a forward's signature."""
    python = graph.python_code("self")
    used = set(re.findall(r"\w+", python.src))
    names = {name: value for name, value in python.globals.items() if name in used}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, ModuleType)}
    objects = {name: value for name, value in names.items() if name not in modules}
    return Source(python.src, tuple(modules.items()), tuple(objects.items()))


def install(module: nn.Module, ways: dict[Course, Source], paths: Collection[str]) -> None:
    """Make `ways` the forward of this one object, as long as the submodules at `paths` stay what they are.

    Raises TypeError where its class takes no subclass in its place.
    """
    original: Any = type(module)
    module.__class__ = rewritten(original, tuple(ways.items()), _structure(module, paths))


def restore(module: nn.Module) -> None:
    """Give the object the class, and so the forward, that it had before `install`."""
    module.__class__ = type(module).__dict__.get("bncli_original", type(module))


def _original(module: nn.Module) -> Any:
    return getattr(type(module), "bncli_original", type(module))


def _structure(module: nn.Module, paths: Collection[str]) -> Structure:
    """What a graph took for granted of a module, of those at `paths`, and so on of those that are rewritten too."""
    found: Structure = ()
    for path in sorted(paths):
        part = module.get_submodule(path)
        names = tuple(path.split(".")) if path else ()
        found += ((names, _original(part), tuple(part._modules)),)
        known: Structure = getattr(type(part), "bncli_structure", ())
        found += tuple(((*names, *below), kind, children) for below, kind, children in known)
    return tuple(dict.fromkeys(found))


def _stands(module: Any, structure: Structure) -> bool:
    for names, kind, children in structure:
        part = module
        for name in names:
            part = part._modules.get(name)
            if part is None:
                return False
        if _original(part) is not kind or tuple(part._modules) != children:
            return False
    return True


@functools.cache
def rewritten(original: Any, ways: Ways, structure: Structure) -> Any:
    """A subclass of `original` whose forward takes the first of `ways` that holds.

    It is the original's forward where none holds, and where a submodule that the ways rely on was exchanged, added or
    taken away since. The same class for the same arguments.
    """
    functions = tuple((course, _compiled(original.__qualname__, source)) for course, source in ways)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if _stands(self, structure):
            for course, function in functions:
                if course.holds(self, arguments):
                    return function(self, *arguments, **options)
        return original.forward(self, *arguments, **options)

    # One code object a class, for torch.compile counts recompilations by it.
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
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
            "bncli_made_of": (original, ways, structure),
            "bncli_structure": structure,
            "forward": forward,
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
    return (_rebuild, made.bncli_made_of, *reduced[2:])


def _rebuild(original: Any, ways: Ways, structure: Structure) -> nn.Module:
    made: nn.Module = object.__new__(original)
    made.__class__ = rewritten(original, ways, structure)
    return made
