"""YAML 1.2's core schema, with the line of every value, and no surprises.

Here `3e-4` is a number, `no` is text and `012` is twelve; PyYAML's own resolver follows YAML 1.1, where they are text,
false and ten (yacs issue 46, LLaMA-Factory issue 4014). Tags are refused; aliases are followed, up to a limit.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from yaml.resolver import BaseResolver

Keys = tuple[str | int, ...]  # the path of a value in the tree
MAX_VALUES = 20_000
MAX_DEPTH = 40
TAGS = "tag:yaml.org,2002:"  # what `!!` stands for


def dotted(keys: Sequence[str | int]) -> str:
    return ".".join(str(key) for key in keys) or "the recipe"


class Mistake(NamedTuple):
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass
class Tree:
    """Plain data, where each value stands (`recipes/digits.yaml:12`, `sets lr=1`), and what is wrong so far."""

    source: str
    root: Any = None
    where: dict[Keys, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    unread: set[Keys] = field(default_factory=set)  # a mistake has been reported instead of a value

    def refuse(self, keys: Keys, text: str) -> None:
        """Note a mistake at a value; for one that is missing, where the nearest thing around it stands."""
        if keys not in self.unread:
            places = (self.where[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.where)
            self.mistakes.append(Mistake(next(places, self.source), f"{dotted(keys)}: {text}"))


# --- reading ------------------------------------------------------------------------------------------------------


class CoreResolver(BaseResolver):
    """YAML 1.2.2, section 10.3.2: what a plain scalar means."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    CoreResolver.add_implicit_resolver(TAGS + _tag, re.compile(f"^(?:{_pattern})$"), _first)


class CoreLoader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, CoreResolver):
    """Text to YAML nodes, no more and no deeper than a recipe can need."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        CoreResolver.__init__(self)
        self.values = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.values += 1
        self.depth += 1
        if self.values > MAX_VALUES:
            raise _TooLarge(f"has more than {MAX_VALUES:,} values; a recipe is a short YAML file")
        if self.depth > MAX_DEPTH:
            raise _TooLarge(_TOO_DEEP)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TOO_DEEP = f"is nested too deeply; a recipe has at most {MAX_DEPTH} levels"


class _TooLarge(Exception):
    pass


def parse(text: str, source: str) -> Tree:
    """One YAML document as plain data. Never raises: what is wrong is in the tree's mistakes."""
    tree = Tree(source)
    node = _compose(text, tree, numbered=True)
    if node is not None:
        _read(node, (), tree, numbered=True)
    return tree


def parse_value(text: str, source: str, keys: Keys) -> Tree:
    """A value for the place `keys`, as a file would read it after `key: `. Its tree's root is the value."""
    tree = Tree(source)
    node = _compose(f"value: {text}", tree, numbered=False)
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        _read(node.value[0][1], keys, tree, numbered=False)
    elif not tree.mistakes:
        tree.mistakes.append(Mistake(source, "expected one value"))
    return tree


def _compose(text: str, tree: Tree, numbered: bool) -> yaml.Node | None:
    try:
        node: yaml.Node | None = CoreLoader(text).get_single_node()
        return node
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position), f"the character {chr(error.character)!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark, begin = error.problem_mark, error.context_mark
        line = mark.line if mark else 0
        since = f" from line {begin.line + 1}" if numbered and begin and begin.line != line else ""
        problem = f"{error.context}{since}, {error.problem}" if error.context else f"{error.problem}"
    except _TooLarge as error:
        tree.mistakes.append(Mistake(tree.source, str(error)))
        return None
    place = f"{tree.source}:{line + 1}" if numbered else tree.source
    tree.mistakes.append(Mistake(place, f"not YAML: {problem}"))
    return None


def _read(node: yaml.Node, keys: Keys, tree: Tree, numbered: bool) -> None:
    try:
        tree.root = _Reader(tree, numbered).plain(node, keys)
    except _TooLarge as error:
        tree.mistakes.append(Mistake(tree.source, str(error)))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": _float,
}


@dataclass
class _Reader:
    """YAML nodes to plain data; aliases are followed, so one node may be read many times."""

    tree: Tree
    numbered: bool
    values: int = 0
    inside: list[yaml.Node] = field(default_factory=list)  # the nodes around the one being read

    def plain(self, node: yaml.Node, keys: Keys, place: str = "") -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _TooLarge(f"its aliases expand to more than {MAX_VALUES:,} values; write out what is needed")
        if len(self.inside) >= MAX_DEPTH:
            raise _TooLarge(_TOO_DEEP)
        self.tree.where[keys] = place or self._place(node)
        if node in self.inside:
            return self._unread(keys, "an alias of what it stands in")
        if _tagged(node):
            return self._unread(keys, f"the tag {node.tag.replace(TAGS, '!!')} is not allowed; write the plain value")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, keys)
        self.inside.append(node)
        if isinstance(node, yaml.MappingNode):
            found: Any = self._mapping(node, keys)
        else:
            found = [self.plain(item, (*keys, index)) for index, item in enumerate(node.value)]
        self.inside.pop()
        return found

    def _place(self, node: yaml.Node) -> str:
        return f"{self.tree.source}:{node.start_mark.line + 1}" if self.numbered else self.tree.source

    def _unread(self, keys: Keys, text: str) -> None:
        self.tree.refuse(keys, text)
        self.tree.unread.add(keys)

    def _scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        kind = node.tag.removeprefix(TAGS)
        if kind == "int" and (len(node.value) > 80 or abs(_SCALARS[kind](node.value)) >= 1 << 63):
            return self._unread(keys, "a whole number of more than 64 bits")
        return _SCALARS[kind](node.value)

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or _tagged(key_node):
                self.tree.mistakes.append(Mistake(place, f"{dotted(keys)}: a key must be a plain word"))
                continue
            below = (*keys, key_node.value)
            if key_node.value in found:
                first = f"; the first is in {self.tree.where[below]}" if self.numbered else ""
                self.tree.mistakes.append(Mistake(place, f"{dotted(below)}: is there twice{first}"))
                continue
            found[key_node.value] = self.plain(value_node, below, place)
        return found


def _tagged(node: yaml.Node) -> bool:
    """Whether a node has another tag than it would have by itself."""
    unquoted = getattr(node, "style", "") is None
    return bool(node.tag != _RESOLVER.resolve(type(node), node.value, (unquoted, False)))


_RESOLVER = CoreResolver()

# --- writing ------------------------------------------------------------------------------------------------------


class CoreDumper(yaml.emitter.Emitter, yaml.serializer.Serializer, yaml.representer.SafeRepresenter, CoreResolver):
    def __init__(self, stream: io.StringIO) -> None:
        yaml.emitter.Emitter.__init__(self, stream, width=110, allow_unicode=True)
        yaml.serializer.Serializer.__init__(self)
        yaml.representer.SafeRepresenter.__init__(self, default_flow_style=None, sort_keys=False)  # type: ignore[arg-type]
        CoreResolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def choose_scalar_style(self) -> str:
        assert isinstance(self.event, yaml.ScalarEvent)
        style: str = super().choose_scalar_style()
        return style if self.event.value.isprintable() else '"'  # the other styles lose line separators


def dump(plain: Any) -> str:
    """Plain data as YAML that `parse` reads back unchanged; lists of scalars stay on one line."""
    stream = io.StringIO()
    dumper = CoreDumper(stream)
    dumper.open()
    dumper.represent(plain)
    dumper.close()
    return stream.getvalue()
