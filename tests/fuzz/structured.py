"""Changes of plain trees (what JSON and YAML hold) as hypothesis makes and shrinks them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, -5.5, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), "NaN", "-Infinity", "", "a", "x" * 3000, "\0", "\x1b[31m", "\ud800",
    "the-canary:make", "../x", "/dev/zero", [], {}, [[]], [{}], {"": None}, {"a": {"a": {}}}, [None], [1, "a"],
)  # fmt: skip

VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=4), st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=3),
).map(copy.deepcopy)  # a later change may be inside it


@st.composite
def changed(draw: st.DrawFn, trees: Sequence[Any]) -> Any:
    """One of the trees after one to three changes, each at a place of its own."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        owner, key = places[draw(st.integers(0, len(places) - 1))]
        change = draw(st.sampled_from(("value", "value", "remove", "add", "copy", "wrap", "rename")))
        if change == "value":
            owner[key] = draw(VALUES)
        elif change == "remove":
            del owner[key]
        elif change == "add" and isinstance(owner, dict):
            owner[draw(st.one_of(st.text(max_size=6), st.sampled_from(("kind", "seed", "epochs"))))] = draw(VALUES)
        elif change == "add":
            owner.insert(key, draw(VALUES))
        elif change == "copy":
            other, other_key = places[draw(st.integers(0, len(places) - 1))]
            owner[key] = copy.deepcopy(other[other_key])
        elif change == "wrap":
            owner[key] = draw(st.sampled_from((lambda it: [it], lambda it: {"a": it}, lambda it: [it] * 30)))(
                owner[key]
            )
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=6))] = owner.pop(key)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each value inside, as the list or mapping that holds it and its key."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
