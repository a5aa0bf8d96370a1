"""Every mistake in a recipe is refused with its line, its key path, what was expected and what was probably meant."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from bncli.recipe.check import nearest, suggestion
from bncli.recipe.overrides import kinds, members
from bncli.recipe.sections import KINDS, Recipe, RecipeFile, shorthand_key
from bncli.recipe.yaml import dump
from tests.recipe.conftest import BASE, NORMS, SECTIONS, MistakesOf, optimizer

ARMS = BASE + "arms:\n  a: {}\n  b: {norm: batch}\n"
SMALL = BASE.replace("{kind: mlp}", "{kind: mlp, hidden: [10, 12]}")
IMAGES = BASE.replace("{source: synthetic}", "{source: synthetic, shape: [3, 8, 8]}")


def model(fields: str) -> str:
    return BASE.replace("kind: mlp", fields)


def train(fields: str) -> str:
    return BASE.replace("steps: 100", fields)


# --- one mistake --------------------------------------------------------------------------------------------------

ONE_MISTAKE = [
    ("a file with nothing in it", "", "r.yaml: is empty; a recipe has the sections data, model, optimizer and train: "
     "see recipes/smoke.yaml"),
    ("a list", "- 1\n", "r.yaml: is a list; a recipe has the sections data, model, optimizer and train: "
     "see recipes/smoke.yaml"),
    ("a word", "digits\n", 'r.yaml: is "digits"; a recipe has the sections data, model, optimizer and train: '
     "see recipes/smoke.yaml"),
    ("not YAML", "data: [1\nmodel: mlp\n", "r.yaml:2: not YAML: while parsing a flow sequence from line 1, expected "
     "',' or ']', but got ':'"),
    ("two documents", BASE + "---\n" + BASE, "r.yaml:5: not YAML: expected a single document in the stream from "
     "line 1, but found another document"),
    ("a key twice", BASE + "train: {steps: 5}\n", "r.yaml:5: train: is there twice; the first is in r.yaml:4"),
    ("two arms of one name", ARMS + "  a: {}\n", "r.yaml:8: arms.a: is there twice; the first is in r.yaml:6"),
    ("a tag", optimizer("kind: sgd, lr: !!python/name:os.system 1"),
     "r.yaml:3: optimizer.lr: the tag !!python/name:os.system is not allowed; write the plain value"),
    ("an alias of itself", BASE + "norm: &x {kind: *x}\n", "r.yaml:5: norm.kind: an alias of what it stands in"),
    ("a huge number", train("steps: 99999999999999999999"),
     "r.yaml:4: train.steps: a whole number of more than 64 bits"),
    # unknown keys
    ("an unknown section", BASE + "modle: mlp\n", "r.yaml:5: modle: unknown key; did you mean model?"),
    ("an unknown key", optimizer("kind: sgd, lr: 0.1, momentun: 0.9"),
     "r.yaml:3: optimizer.momentun: unknown key; did you mean momentum?"),
    ("a key like no other", optimizer("kind: sgd, lr: 0.1, qqqqqq: 0.9"),
     "r.yaml:3: optimizer.qqqqqq: unknown key; expected kind, lr, weight_decay, weight_decay_on, momentum or nesterov"),
    ("the beginning of a key", train("steps: 100, eval: 5"),
     "r.yaml:4: train.eval: unknown key; did you mean evaluate_every?"),
    ("a key of another kind", optimizer("kind: adam, lr: 0.1, momentum: 0.9"),
     "r.yaml:3: optimizer.momentum: unknown key; it belongs to sgd, not to adam"),
    ("a key of several other kinds", BASE + "norm: {kind: none, eps: 1}\n",
     "r.yaml:5: norm.eps: unknown key; it belongs to batch, layer, group or instance, not to none"),
    ("a merge key", optimizer("kind: sgd, lr: 0.1, <<: {momentum: 0.9}"),
     "r.yaml:3: optimizer.<<: unknown key; expected kind, lr, weight_decay, weight_decay_on, momentum or nesterov"),
    # kinds
    ("norm: no", BASE + "norm: no\n", f'r.yaml:5: norm.kind: expected {NORMS}, found "no"; did you mean none?'),
    ("norm: false", BASE + "norm: false\n", f"r.yaml:5: norm.kind: expected {NORMS}, found false"),
    ("norm without a value", BASE + "norm:\n",
     "r.yaml:5: norm: expected none, batch, layer, group, instance or a mapping, found nothing"),
    ("norm as a list", BASE + "norm: [batch]\n",
     "r.yaml:5: norm: expected none, batch, layer, group, instance or a mapping, found a list"),
    ("a kind as a list", model("kind: [mlp]"),
     "r.yaml:2: model.kind: expected mlp, cnn, resnet or module, found a list"),
    ("a kind left out", model("hidden: [9]"), "r.yaml:2: model.kind: is missing; expected mlp, cnn, resnet or module"),
    ("a misspelt `kind`", model("knid: mlp"), "r.yaml:2: model.knid: unknown key; did you mean kind?"),
    ("a misspelt `source`", BASE.replace("source", "sorce"), "r.yaml:1: data.sorce: unknown key; did you mean source?"),
    ("a misspelt choice", model("kind: mlp, activation: rleu"), "r.yaml:2: model.activation: expected sigmoid, tanh, "
     'relu, leaky_relu or gelu, found "rleu"; did you mean relu?'),
    ("a depth that is none of He's", IMAGES.replace("kind: mlp", "kind: resnet, depth: 21"),
     "r.yaml:2: model.depth: expected 18, 20, 32, 34, 44, 50, 56 or 110, found 21"),
    # types
    ("text for a number", optimizer("kind: sgd, lr: fast"), 'r.yaml:3: optimizer.lr: expected a number, found "fast"'),
    ("a quoted number", optimizer("kind: sgd, lr: '0.1'"), 'r.yaml:3: optimizer.lr: expected a number, found "0.1"'),
    ("true for a number", optimizer("kind: sgd, lr: true"), "r.yaml:3: optimizer.lr: expected a number, found true"),
    ("nothing for a number", optimizer("kind: sgd, lr:"), "r.yaml:3: optimizer.lr: expected a number, found nothing"),
    ("a fraction for a count", train("steps: 1.5"), "r.yaml:4: train.steps: expected a whole number, found 1.5"),
    ("a count in scientific notation", train("steps: 1e3"),
     "r.yaml:4: train.steps: expected a whole number, found 1000.0"),
    ("yes for a truth value", train("steps: 100, compile: yes"),
     'r.yaml:4: train.compile: expected true or false, found "yes"'),
    ("a number for a list", model("kind: mlp, hidden: 100"), "r.yaml:2: model.hidden: expected a list, found 100"),
    ("a mapping for a list", model("kind: mlp, hidden: {a: 1}"),
     "r.yaml:2: model.hidden: expected a list, found a mapping"),
    ("a bad element", model("kind: mlp, hidden: [9, x]"),
     'r.yaml:2: model.hidden.1: expected a whole number, found "x"'),
    ("nothing but a bad element", model("kind: mlp, hidden: [0]"),
     "r.yaml:2: model.hidden.0: expected at least 1, found 0"),
    ("a number for a section", train("steps: 100, target: 0.95"),
     "r.yaml:4: train.target: expected a mapping, found 0.95"),
    ("a number for text", BASE.replace("{source: synthetic}", "{source: npz, path: 7}"),
     "r.yaml:1: data.path: expected text, found 7"),
    ("a long text", optimizer(f"kind: sgd, lr: {'x' * 500}"),
     f'r.yaml:3: optimizer.lr: expected a number, found "{"x" * 49} ...'),
    ("a section as a list", BASE.replace("{steps: 100}", "[100]"), "r.yaml:4: train: expected a mapping, found a list"),
    # ranges
    ("a negative rate", optimizer("kind: sgd, lr: -1"), "r.yaml:3: optimizer.lr: expected a number above 0, found -1"),
    ("no steps", train("steps: 0"), "r.yaml:4: train.steps: expected at least 1, found 0"),
    ("a momentum of 1", optimizer("kind: sgd, lr: 1, momentum: 1"),
     "r.yaml:3: optimizer.momentum: expected a number below 1, found 1"),
    ("too many seeds", BASE + "seeds: {tune: 1001}\n", "r.yaml:5: seeds.tune: expected at most 1000, found 1001"),
    ("an infinite rate", optimizer("kind: sgd, lr: .inf"),
     "r.yaml:3: optimizer.lr: expected a finite number, found Infinity"),
    ("a rate that is not a number", optimizer("kind: sgd, lr: .nan"),
     "r.yaml:3: optimizer.lr: expected a finite number, found NaN"),
    ("no layers", model("kind: mlp, hidden: []"),
     "r.yaml:2: model.hidden: expected a list of at least 1, found an empty list"),
    ("too many betas", optimizer("kind: adam, lr: 1, betas: [0, 0, 0]"),
     "r.yaml:3: optimizer.betas: expected a list of at most 2, found a list"),
    ("too few betas", optimizer("kind: adam, lr: 1, betas: [0]"), "r.yaml:3: optimizer.betas.1: is missing"),
    ("more digits held out than there are", BASE.replace("{source: synthetic}", "{source: digits, held_out: 1797}"),
     "r.yaml:1: data.held_out: expected a number below 1797, found 1797"),
    # fields of one section that do not go together
    ("gaussian weights without a std", model("kind: mlp, init: gaussian"),
     "r.yaml:2: model.init: gaussian weights need a std"),
    ("a std without gaussian weights", model("kind: mlp, init: {kind: he, std: 0.1}"),
     "r.yaml:2: model.init: std belongs to gaussian weights, not to he"),
    ("nesterov without momentum", optimizer("kind: sgd, lr: 0.1, nesterov: true"),
     "r.yaml:3: optimizer: nesterov needs a momentum above 0"),
    ("an accuracy in percent", train("steps: 100, target: {value: 95}"),
     "r.yaml:4: train.target: accuracy is a share of 1: write 0.95 for 95 %"),
    ("an own model without a function", model("kind: module, module: mine"),
     'r.yaml:2: model.module: expected package.module:function, found "mine"'),
    ("an own model without permission", model("kind: module, module: my.net:make"),
     "r.yaml:2: model.module: my.net:make is code of yours that would run; allow it with allow_code=True"),
    # sections that do not go together
    ("a cnn on vectors", model("kind: cnn"), "r.yaml:2: model.kind: a cnn needs images and the data are vectors; "
     "give data.shape as [channels, height, width]"),
    ("a resnet on digits", model("kind: resnet, depth: 20").replace("{source: synthetic}", "digits"),
     "r.yaml:2: model.kind: a resnet needs images and the data are vectors; set data.images: true"),
    ("groups that do not divide", SMALL + "norm: {kind: group, groups: 4}\n",
     "r.yaml:5: norm.groups: 4 groups do not divide a layer of 10 channels"),
    ("an instance norm in an mlp", BASE + "norm: instance\n", "r.yaml:5: norm.kind: instance norm has one value to "
     "average over in a layer of 100 channels, so nothing is left"),
    ("evaluations later than the budget", train("steps: 100, evaluate_every: 101"),
     "r.yaml:4: train.evaluate_every: is larger than the budget of 100 steps: no evaluation would happen"),
    ("a batch larger than the data", train("steps: 100, batch_size: 2001"),
     "r.yaml:4: train.batch_size: is larger than the 2000 training examples"),
    ("a batch of one with batch norm", train("steps: 100, batch_size: 1") + "norm: batch\n",
     "r.yaml:4: train.batch_size: batch norm has one value to average over in a layer of 100 channels, so nothing is "
     "left"),
    ("milestones out of order", BASE + "schedule: {kind: step, milestones: [30, 20]}\n",
     "r.yaml:5: schedule.milestones: expected steps in rising order"),
    ("a shape of two numbers", BASE.replace("synthetic", "synthetic, shape: [8, 8]"),
     "r.yaml:1: data.shape: expected [features] or [channels, height, width]"),
    ("channels last for vectors", train("steps: 100, memory_format: channels_last"),
     "r.yaml:4: train.memory_format: channels_last is for images and the data are vectors"),
    # arms
    ("an arm that is a number", BASE + "arms: {a: 3}\n", "r.yaml:5: arms.a: expected a mapping, found 3"),
    ("an arm with the name of a section", BASE + "arms: {model: mlp}\n",
     'r.yaml:5: arms.model: expected a mapping, found "mlp"'),
    ("arms without a value", BASE + "arms:\n", "r.yaml:5: arms: expected a mapping, found nothing"),
    ("a name that is no name", BASE + "arms:\n  a/b: {}\n",
     'r.yaml:6: arms.a/b: expected a name of letters, digits, spaces, +, - and _, found "a/b"'),
    ("a name that is too long", BASE + f"arms:\n  {'a' * 41}: {{}}\n",
     f'r.yaml:6: arms.{"a" * 41}: expected at most 40 characters, found "{"a" * 41}"'),
    ("a misspelt kind in an arm", ARMS + "  c:\n    norm: bacth\n",
     f'r.yaml:9: arms.c.norm.kind: expected {NORMS}, found "bacth"; did you mean batch?'),
    ("an arm in an arm", ARMS + "  c: {arms: {}}\n", f"r.yaml:8: arms.c.arms: unknown key; expected {SECTIONS}"),
    ("a contradiction in an arm", ARMS + "  c: {model: {hidden: [9]}, norm: group}\n",
     "r.yaml:8: arms.c.norm.groups: 4 groups do not divide a layer of 9 channels"),
    ("a contradiction of an arm with the base", SMALL + "norm: {kind: group, groups: 2}\narms:\n  a:\n"
     "    model: {hidden: [9]}\n", "r.yaml:7: arms.a.norm.groups: 2 groups do not divide a layer of 9 channels"),
    # reference
    ("a misspelt reference", BASE + "arms: {plain: , norm: {norm: batch}}\nreference: plian\n",
     "r.yaml:6: reference: there is no arm plian; did you mean plain?"),
    ("another reference", ARMS + "reference: plain\n", "r.yaml:8: reference: there is no arm plain; expected a or b"),
    ("a reference without arms", BASE + "reference: plain\n",
     "r.yaml:5: reference: there is no arm plain; the recipe has no arms"),
    ("a reference that is a number", ARMS + "reference: 3\n", "r.yaml:8: reference: expected text, found 3"),
    # grid
    ("a grid that is a list", ARMS + "grid: [1]\n", "r.yaml:8: grid: expected a mapping, found a list"),
    ("a misspelt field in the grid", ARMS + "grid: {optimizer.lrr: [1, 2]}\n",
     "r.yaml:8: grid.optimizer.lrr: unknown key; did you mean lr?"),
    ("a misspelt section in the grid", ARMS + "grid: {optimiser.lr: [1, 2]}\n",
     "r.yaml:8: grid.optimiser.lr: unknown key; did you mean optimizer?"),
    ("a field that only some arms have", ARMS + "grid: {norm.eps: [1, 2]}\n", "r.yaml:8: grid.norm.eps: in arm a: "
     "unknown key; it belongs to batch, layer, group or instance, not to none"),
    ("a path through a value in the grid", ARMS + "grid: {optimizer.lr.x: [1]}\n",
     "r.yaml:8: grid.optimizer.lr.x: expected a number, found a mapping"),
    ("an argument that is not in the recipe", model("kind: cnn, channels: [4]").replace("synthetic",
     "synthetic, shape: [1, 8, 8]") + "grid: {model.arguments.x: [1]}\n",
     "r.yaml:5: grid.model.arguments.x: unknown key; it belongs to module, not to cnn"),
    ("one value for a grid", ARMS + "grid: {optimizer.lr: 1}\n",
     "r.yaml:8: grid.optimizer.lr: expected a list, found 1"),
    ("no value for a grid", ARMS + "grid: {optimizer.lr: []}\n",
     "r.yaml:8: grid.optimizer.lr: expected a list of at least 1, found an empty list"),
    ("a wrong value in the grid", ARMS + "grid: {optimizer.lr: [1, -2]}\n",
     "r.yaml:8: grid.optimizer.lr.1: expected a number above 0, found -2"),
    ("a wrong element of a value in the grid", ARMS + "grid: {model.hidden: [[9], [9, 0]]}\n",
     "r.yaml:8: grid.model.hidden.1.1: expected at least 1, found 0"),
    ("a value twice", ARMS + "grid: {optimizer.lr: [1, 2, 1.0]}\n",
     "r.yaml:8: grid.optimizer.lr.2: 1.0 is there twice"),
    ("a value that contradicts its section", ARMS + "grid: {optimizer.nesterov: [false, true]}\n",
     "r.yaml:8: grid.optimizer.nesterov.1: in optimizer: nesterov needs a momentum above 0"),
    ("a value that contradicts the rest", ARMS + "grid: {train.batch_size: [10, 3000]}\n",
     "r.yaml:8: grid.train.batch_size.1: is larger than the 2000 training examples"),
    ("a value that contradicts another section", SMALL + "norm: {kind: group, groups: 2}\n"
     "grid: {model.hidden: [[4], [5]]}\n",
     "r.yaml:6: grid.model.hidden.1: in norm.groups: 2 groups do not divide a layer of 5 channels"),
    ("a value that contradicts one arm", SMALL + "norm: {kind: group, groups: 2}\narms:\n  a:\n"
     "  b: {model: {hidden: [8]}}\ngrid: {norm.groups: [2, 4]}\n",
     "r.yaml:9: grid.norm.groups.1: in arm a: 4 groups do not divide a layer of 10 channels"),
    ("a section in the grid", ARMS + "grid: {norm: [batch, layer]}\n",
     "r.yaml:8: grid.norm: chooses a whole section; make an arm of each choice"),
    ("a kind in the grid", ARMS + "grid: {norm.kind: [batch, layer]}\n",
     "r.yaml:8: grid.norm.kind: chooses a whole section; make an arm of each choice"),
    ("seeds in the grid", ARMS + "grid: {train.seed: [1, 2]}\n",
     "r.yaml:8: grid.train.seed: is the same for every run of a comparison, so it cannot be tuned"),
    ("the data in the grid", ARMS + "grid: {data.noise: [1, 2]}\n",
     "r.yaml:8: grid.data.noise: is the same for every run of a comparison, so it cannot be tuned"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [pytest.param(*case[1:], id=case[0]) for case in ONE_MISTAKE])
def test_a_mistake_is_refused_with_its_place_and_what_was_expected(
    mistakes_of: MistakesOf, text: str, message: str
) -> None:
    assert mistakes_of(text) == (message,)


def test_sections_that_are_missing_are_all_named(mistakes_of: MistakesOf) -> None:
    missing = tuple(f"r.yaml:2: {name}: is missing" for name in ("data", "model", "optimizer", "train"))
    assert mistakes_of("# a comment\nseeds: {tune: 1}\n") == missing


def test_sections_that_are_empty_are_all_named(mistakes_of: MistakesOf) -> None:
    assert mistakes_of("data:\nmodel:\noptimizer:\ntrain:\n") == (
        "r.yaml:1: data: expected digits, synthetic, npz, hub or a mapping, found nothing",
        "r.yaml:2: model: expected mlp, cnn, resnet, module or a mapping, found nothing",
        "r.yaml:3: optimizer: expected sgd, adam, adamw or a mapping, found nothing",
        "r.yaml:4: train: expected a mapping, found nothing",
    )


def test_the_rest_of_a_section_is_checked_as_the_kind_that_was_probably_meant(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(model("kind: mpl, hiden: [9], init: {kind: xvaier}")) == (
        'r.yaml:2: model.kind: expected mlp, cnn, resnet or module, found "mpl"; did you mean mlp?',
        "r.yaml:2: model.init.kind: expected gaussian, xavier, he, orthogonal or lsuv, found \"xvaier\"; "
        "did you mean xavier?",
        "r.yaml:2: model.hiden: unknown key; did you mean hidden?",
    )  # fmt: skip


def test_keys_that_no_kind_has_are_refused_where_the_kind_cannot_be_guessed(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(model("kind: transformer, hiden: [9], depth: 20")) == (
        'r.yaml:2: model.kind: expected mlp, cnn, resnet or module, found "transformer"',
        "r.yaml:2: model.hiden: unknown key; did you mean hidden?",
    )


# --- all in one pass ----------------------------------------------------------------------------------------------

EIGHT = """\
data: {source: digits, held_out: 1800}
model:
  kind: mlp
  hiden: [100]
  activation: sigmod
norm: no
optimizer: {kind: sgd, lr: -1}
train:
  steps: many
arms:
  plain:
  twice: {optimizer: {momentum: 2}}
  twice: {}
reference: plan
grid:
  optimizer.lr: [1, 1]
"""


def test_all_mistakes_of_a_file_and_its_flags_are_found_in_one_pass_and_told_in_order(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(EIGHT, "seeds.tune=0") == (
        "r.yaml:1: data.held_out: expected a number below 1797, found 1800",
        "r.yaml:4: model.hiden: unknown key; did you mean hidden?",
        "r.yaml:5: model.activation: expected sigmoid, tanh, relu, leaky_relu or gelu, found \"sigmod\"; "
        "did you mean sigmoid?",
        f'r.yaml:6: norm.kind: expected {NORMS}, found "no"; did you mean none?',
        "r.yaml:7: optimizer.lr: expected a number above 0, found -1",
        'r.yaml:9: train.steps: expected a whole number, found "many"',
        "r.yaml:12: arms.twice.optimizer.momentum: expected a number below 1, found 2",
        "r.yaml:13: arms.twice: is there twice; the first is in r.yaml:12",
        "r.yaml:14: reference: there is no arm plan; did you mean plain?",
        "r.yaml:16: grid.optimizer.lr.1: 1 is there twice",
        "sets seeds.tune=0: seeds.tune: expected at least 1, found 0",
    )  # fmt: skip


def test_what_arms_inherit_from_the_base_is_said_once(mistakes_of: MistakesOf) -> None:
    text = optimizer("kind: sgd, lr: -1, momentun: 3") + "arms: {a: {norm: batch}, b: {optimizer: {momentum: 0.5}}}\n"
    assert mistakes_of(text) == (
        "r.yaml:3: optimizer.lr: expected a number above 0, found -1",
        "r.yaml:3: optimizer.momentun: unknown key; did you mean momentum?",
    )
    assert mistakes_of(BASE + "norm: instance\narms: {a: , b: {optimizer: adam}}\n") == (
        "r.yaml:5: norm.kind: instance norm has one value to average over in a layer of 100 channels, so nothing is "
        "left",
    )  # fmt: skip
    own = model("kind: module, module: a:b") + "arms: {a: , b: {norm: batch}}\n"
    assert len(mistakes_of(own)) == 1
    assert mistakes_of(own, allow_code=True) == ()


def test_a_mistake_of_the_base_is_said_even_where_every_arm_mends_it(mistakes_of: MistakesOf) -> None:
    text = optimizer("kind: sgd, lr: -1") + "arms: {a: {optimizer: {lr: 1}}}\n"
    assert mistakes_of(text) == ("r.yaml:3: optimizer.lr: expected a number above 0, found -1",)


def test_a_mistake_that_several_arms_make_for_themselves_is_said_of_each(mistakes_of: MistakesOf) -> None:
    text = BASE + "arms:\n  a: {optimizer: {lr: 0}}\n  b: {optimizer: {lr: 0}}\n"
    assert mistakes_of(text) == (
        "r.yaml:6: arms.a.optimizer.lr: expected a number above 0, found 0",
        "r.yaml:7: arms.b.optimizer.lr: expected a number above 0, found 0",
    )


def test_a_field_of_the_grid_is_not_asked_of_an_arm_that_fixes_it(mistakes_of: MistakesOf) -> None:
    text = BASE + "arms: {a: {train: {batch_size: 5}}, b: }\ngrid: {train.batch_size: [10, 3000]}\n"
    assert mistakes_of(text) == (
        "r.yaml:6: grid.train.batch_size.1: is larger than the 2000 training examples",
    )  # fmt: skip


# --- spelling -----------------------------------------------------------------------------------------------------


def test_the_nearest_name_is_suggested_or_else_those_that_the_word_begins() -> None:
    names = ["batch", "layer", "evaluate_every", "evaluate_at"]
    assert nearest("bathc", names) == ["batch"]
    assert nearest("eval", names) == ["evaluate_every", "evaluate_at"]
    assert nearest("transformer", names) == []
    assert suggestion("transformer", names[:3]) == "expected batch, layer or evaluate_every"


LETTERS = string.ascii_lowercase + "_"


def typos(word: str, letters: str = LETTERS) -> set[str]:
    """Every word that one slip of the finger makes: a letter left out, added or replaced, or two swapped."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    left_out = {before + after[1:] for before, after in cuts if after}
    added = {before + letter + after for before, after in cuts for letter in letters}
    replaced = {before + letter + after[1:] for before, after in cuts if after for letter in letters}
    swapped = {before + after[1] + after[0] + after[2:] for before, after in cuts if len(after) > 1}
    return (left_out | added | replaced | swapped) - {word, ""}


@dataclass(frozen=True)
class Place:
    """A section of the models: its path, the kinds that lead to it, its own kind, and the keys that it can have."""

    path: tuple[str, ...]
    around: tuple[dict[str, str], ...]
    chosen: dict[str, str]
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([".".join(self.path) or "top", *self.chosen.values()])

    def holding(self, section: dict[str, Any]) -> dict[str, Any]:
        """The recipe with nothing but this section."""
        for key, kind in zip(reversed(self.path), reversed(self.around), strict=True):
            section = {**kind, key: section}
        return section

    def field(self, key: str) -> str:
        return ".".join((*self.path, key))


def places(
    model: type[BaseModel], path: tuple[str, ...] = (), around: tuple[dict[str, str], ...] = ()
) -> Iterator[Place]:
    """Every section that the models know, at every level and of every kind."""
    chosen = {key: kind for kind in kinds([model]) for key in KINDS if key in model.model_fields}
    yield Place(path, around, chosen, tuple(model.model_fields))
    for name, field in model.model_fields.items():
        for member in members(field.annotation):
            yield from places(member, (*path, name), (*around, chosen))


PLACES = list(places(RecipeFile))


def suggested(mistake: str) -> list[str]:
    return mistake.split(": unknown key; did you mean ")[1].removesuffix("?").replace(" or ", ", ").split(", ")


def test_the_places_hold_every_section_and_level() -> None:
    paths = {".".join(place.path) for place in PLACES}
    assert paths >= {
        "",
        "data",
        "model",
        "model.init",
        "norm",
        "optimizer",
        "schedule",
        "train",
        "train.target",
        "seeds",
    }
    assert sum(len(place.keys) for place in PLACES) > 80


@pytest.mark.parametrize("letters", ["eq_", pytest.param(LETTERS, marks=pytest.mark.slow)], ids=["some letters", "all"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_one_letter_typo_of_every_key_is_refused_and_the_key_suggested(
    mistakes_of: MistakesOf, place: Place, letters: str
) -> None:
    for key in place.keys:
        wrong = typos(key, letters) - set(place.keys)
        section: dict[str, Any] = {name: kind for name, kind in place.chosen.items() if name != key}
        section |= dict.fromkeys(wrong, place.chosen.get(key))  # a misspelt `kind` still holds the kind
        said = {mistake.split(": ")[1]: mistake for mistake in mistakes_of(dump(place.holding(section)))}
        for typo in wrong:
            assert key in suggested(said[place.field(typo)])


@st.composite
def misspelt_keys(draw: st.DrawFn) -> tuple[Place, str, str]:
    place = draw(st.sampled_from(PLACES))
    key = draw(st.sampled_from(place.keys))
    return place, key, draw(st.sampled_from(sorted(typos(key) - set(place.keys))))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(misspelt_keys(), st.sampled_from(["file", "arm", "flag", "grid"]))
def test_a_typo_is_refused_wherever_a_key_can_stand(
    mistakes_of: MistakesOf, misspelt: tuple[Place, str, str], where: str
) -> None:
    place, key, typo = misspelt
    with_typo = place.holding({**place.chosen, typo: 1})
    if where == "file":
        found = mistakes_of(dump(with_typo))
    elif where == "flag":
        found = mistakes_of(dump(place.holding(place.chosen)), f"{place.field(typo)}=1")
    elif where == "arm":
        assume(place.path[0] != "seeds" if place.path else key in Recipe.model_fields)
        found = mistakes_of(BASE + dump({"arms": {"a": with_typo}}))
    else:
        assume(place.path and place.path[0] not in ("seeds", "data", "train") and key not in KINDS)
        found = mistakes_of(dump({**place.holding(place.chosen), "grid": {place.field(typo): [1]}}))
    hints = [mistake for mistake in found if f"{place.field(typo)}: unknown key; did you mean " in mistake]
    assert [key in suggested(hint) for hint in hints] == [True]


def test_a_shorthand_exists_for_exactly_the_sections_that_have_kinds() -> None:
    sections = {place.path[-1]: bool(place.chosen) for place in PLACES if place.path}
    assert {name for name in sections if shorthand_key(name)} == {name for name, has in sections.items() if has}
