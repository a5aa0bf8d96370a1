"""YAML 1.2's core schema, with the line of every value.

Here `3e-4` is a number, `no` is text and `012` is twelve; PyYAML's own resolver follows YAML 1.1, where they are text,
false and ten (yacs issue 46, LLaMA-Factory issue 4014). Tags are refused; aliases are followed, up to a limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

Keys = tuple[str | int, ...]  # the path of a value in the tree
MAX_VALUES = 20_000
MAX_DEPTH = 40
TAGS = "tag:yaml.org,2002:"  # what `!!` stands for


def dotted(keys: Sequence[str | int]) -> str:
    """A path for people: `claims.2.arm` is of the second claim, which has index 1."""
    return ".".join(str(key + 1 if isinstance(key, int) else key) for key in keys) or "the recipe"


class Mistake(NamedTuple):
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass
class Tree:
    """Plain data, the place of each value (`recipes/digits.yaml:12`, `sets lr=1`), and the mistakes so far."""

    source: str
    root: Any = None
    where: dict[Keys, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    unread: set[Keys] = field(default_factory=set)  # a mistake has been reported instead of a value

    def refuse(self, keys: Keys, text: str) -> None:
        """Note a mistake at a value; for one that is missing, at the nearest value around it."""
        around = [keys[:end] for end in range(len(keys), -1, -1)]
        if not self.unread.intersection(around):
            places = (self.where[each] for each in around if each in self.where)
            self.mistakes.append(Mistake(next(places, self.source), f"{dotted(keys)}: {text}"))


# --- reading ------------------------------------------------------------------------------------------------------


class CoreLoader(yaml.SafeLoader):
    """Text to YAML nodes of the core schema, no more and no deeper than a recipe can need."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- as PyYAML has it
    values = depth = 0

    def scan_flow_scalar_non_spaces(self, double: bool, start_mark: yaml.Mark) -> list[str]:
        try:
            found: list[str] = super().scan_flow_scalar_non_spaces(double, start_mark)
            "".join(found).encode()  # neither "\\ud800", half a character, nor "\\U00110000", none
        except (ValueError, OverflowError) as error:
            raise yaml.scanner.ScannerError(None, None, "an escape is of no character", start_mark) from error
        return found

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.values += 1
        self.depth += 1
        _limit(self.values, self.depth, f"has more than {MAX_VALUES:,} values; a recipe is a short YAML file")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class CoreDumper(yaml.SafeDumper):
    yaml_implicit_resolvers = CoreLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def choose_scalar_style(self) -> str:
        assert isinstance(self.event, yaml.ScalarEvent)
        style: str = super().choose_scalar_style()
        return style if self.event.value.isprintable() else '"'  # the other styles lose line separators


# YAML 1.2.2, section 10.3.2: what a plain scalar means.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    CoreLoader.add_implicit_resolver(TAGS + _tag, re.compile(f"^(?:{_pattern})$"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),  # .inf, .nan
}


class _TooLarge(Exception):
    pass


def _limit(values: int, depth: int, too_many: str) -> None:
    if values > MAX_VALUES:
        raise _TooLarge(too_many)
    if depth > MAX_DEPTH:
        raise _TooLarge(f"is nested too deeply; a recipe has at most {MAX_DEPTH} levels")


def parse(text: str, source: str, keys: Keys | None = None) -> Tree:
    """One YAML document as plain data. Never raises: what is wrong is in the tree's mistakes.

    With `keys` the text is a value for that place, read as a file's is after `key: `; its values have no lines.
    """
    reader = _Reader(Tree(source), keys is None)
    line, problem = 0, ""
    try:
        node = CoreLoader(text if keys is None else f"value: {text}").get_single_node()
        if keys is not None:
            if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
                node = node.value[0][1]
            else:
                node, problem = None, "expected one value"
        if node is not None:
            reader.tree.root = reader.plain(node, keys or ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"not YAML: the character {chr(error.character)!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark, begin = error.problem_mark, error.context_mark
        line = mark.line + 1 if mark else 1
        since = f" from line {begin.line + 1}" if keys is None and begin and begin.line + 1 != line else ""
        problem = "not YAML: " + (f"{error.context}{since}, " if error.context else "") + str(error.problem)
    except _TooLarge as error:
        problem = str(error)
    if problem:
        place = f"{source}:{line}" if line and keys is None else source
        reader.tree.mistakes.append(Mistake(place, problem))
    return reader.tree


@dataclass
class _Reader:
    """YAML nodes to plain data; aliases are followed, so one node may be read many times."""

    tree: Tree
    numbered: bool  # whether places have lines
    values: int = 0
    around: list[yaml.Node] = field(default_factory=list)  # the nodes around the one being read

    def plain(self, node: yaml.Node, keys: Keys, place: str = "") -> Any:
        self.values += 1
        too_many = f"its aliases expand to more than {MAX_VALUES:,} values; write out what is needed"
        _limit(self.values, len(self.around) + 1, too_many)
        self.tree.where[keys] = place or self._place(node)
        if node in self.around:
            return self._unread(keys, "an alias of a value that contains it")
        if _tagged(node):
            return self._unread(keys, f"the tag {node.tag.replace(TAGS, '!!')} is not allowed; write the plain value")
        if isinstance(node, yaml.ScalarNode):
            kind, text = node.tag.removeprefix(TAGS), node.value
            if kind == "int" and (len(text) > 80 or abs(_SCALARS[kind](text)) >= 1 << 63):
                return self._unread(keys, "a whole number of more than 64 bits")
            return _SCALARS[kind](text)
        self.around.append(node)
        if isinstance(node, yaml.MappingNode):
            found: Any = self._mapping(node, keys)
        else:
            found = [self.plain(item, (*keys, index)) for index, item in enumerate(node.value)]
        self.around.pop()
        return found

    def _place(self, node: yaml.Node) -> str:
        return f"{self.tree.source}:{node.start_mark.line + 1}" if self.numbered else self.tree.source

    def _unread(self, keys: Keys, text: str) -> None:
        self.tree.refuse(keys, text)
        self.tree.unread.add(keys)

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place, below = self._place(key_node), (*keys, key_node.value)
            if not isinstance(key_node, yaml.ScalarNode) or _tagged(key_node):
                self.tree.mistakes.append(Mistake(place, f"{dotted(keys)}: a key must be a plain word"))
            elif ":" in key_node.value and key_node.style is None and value_node.value == "":
                self._unread(keys, f"write a space after the colon: {key_node.value.replace(':', ': ', 1)}")
            elif key_node.value in found:
                first = f"; the first is in {self.tree.where[below]}" if self.numbered else ""
                self.tree.mistakes.append(Mistake(place, f"{dotted(below)}: appears twice{first}"))
            else:
                found[key_node.value] = self.plain(value_node, below, place)
        return found


def _tagged(node: yaml.Node) -> bool:
    """Whether a node has another tag than it would have by itself."""
    unquoted = getattr(node, "style", "") is None
    return bool(node.tag != _RESOLVER.resolve(type(node), node.value, (unquoted, False)))


_RESOLVER = CoreLoader("")

# --- writing ------------------------------------------------------------------------------------------------------


def dump(plain: Any) -> str:
    """Plain data as YAML that `parse` reads back unchanged; lists of scalars stay on one line."""
    text: str = yaml.dump(
        plain, Dumper=CoreDumper, width=110, allow_unicode=True, default_flow_style=None, sort_keys=False
    )
    return text
