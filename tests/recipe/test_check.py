"""Every mistake in a recipe is refused with its line, its key path, what was expected and what was probably meant."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from bncli.names import MEASURES
from bncli.recipe.check import nearest, suggestion
from bncli.recipe.overrides import kinds, members
from bncli.recipe.sections import KINDS, Recipe, RecipeFile, shorthand_key
from bncli.recipe.yaml import dotted, dump
from tests.recipe.conftest import BASE, NORMS, NORMS_WITH_EPS, PROBES, SECTIONS, MistakesOf, optimizer

ARMS = BASE + "arms:\n  a: {}\n  b: {norm: batch}\n"
SMALL = BASE.replace("{kind: mlp}", "{kind: mlp, hidden: [10, 12]}")
IMAGES = BASE.replace("{source: synthetic}", "{source: synthetic, shape: [3, 8, 8]}")


def model(fields: str) -> str:
    return BASE.replace("kind: mlp", fields)


def train(fields: str) -> str:
    return BASE.replace("steps: 100", fields)


# --- one mistake --------------------------------------------------------------------------------------------------

# A text, and its mistake behind the name of the file: the line, the key and the sentence.
ONE_MISTAKE = [
    ("", " is empty; a recipe has the sections data, model, optimizer and train: see the example smoke"),
    ("- 1\n", " is a list; a recipe has the sections data, model, optimizer and train: see the example smoke"),
    ("digits\n", ' is "digits"; a recipe has the sections data, model, optimizer and train: see the example smoke'),
    (BASE + "train: {steps: 5}\n", "5: train: appears twice; the first is in r.yaml:4"),
    (ARMS + "  a: {}\n", "8: arms.a: appears twice; the first is in r.yaml:6"),
    # unknown keys
    (BASE + "modle: mlp\n", "5: modle: unknown key; did you mean model?"),
    (optimizer("kind: sgd, lr: 0.1, momentun: 0.9"), "3: optimizer.momentun: unknown key; did you mean momentum?"),
    (optimizer("kind: sgd, lr: 0.1, qqqqqq: 0.9"),
     "3: optimizer.qqqqqq: unknown key; expected kind, lr, weight_decay, weight_decay_on, momentum or nesterov"),
    (BASE + "'[x]': 1\n", "5: [x]: unknown key; expected data, model, norm, optimizer, schedule, train, "
     "probes, arms, reference, grid, seeds, claims or largest_learning_rate"),
    (BASE + "arms: {a: {'[x]': 1}}\n",
     "5: arms.a.[x]: unknown key; expected data, model, norm, optimizer, schedule, train or probes"),
    (train("steps: 100, eval: 5"), "4: train.eval: unknown key; did you mean evaluate_every?"),
    (optimizer("kind: adam, lr: 0.1, momentum: 0.9"),
     "3: optimizer.momentum: unknown key; it belongs to sgd, not to adam"),
    (BASE + "norm: {kind: none, eps: 1}\n",
     f"5: norm.eps: unknown key; it belongs to {NORMS_WITH_EPS}, not to none"),
    (optimizer("kind: sgd, lr: 0.1, <<: {momentum: 0.9}"),
     "3: optimizer.<<: unknown key; expected kind, lr, weight_decay, weight_decay_on, momentum or nesterov"),
    # kinds
    (BASE + "norm: no\n", f'5: norm.kind: expected {NORMS}, found "no"; did you mean none or noisy?'),
    (BASE + "norm: false\n", f"5: norm.kind: expected {NORMS}, found false"),
    (BASE + "norm:\n", f"5: norm: expected {NORMS.replace(' or', ',')} or a mapping, found nothing"),
    (BASE + "norm: [batch]\n", f"5: norm: expected {NORMS.replace(' or', ',')} or a mapping, found a list"),
    (model("kind: mlp, init: "),
     "2: model.init: expected gaussian, xavier, he, orthogonal, lsuv or a mapping, found nothing"),
    (model("kind: cosine, hidden: [9]"),
     '2: model.kind: expected mlp, cnn, resnet, inception or module, found "cosine"'),
    (model("kind: [mlp]"), "2: model.kind: expected mlp, cnn, resnet, inception or module, found a list"),
    (model("hidden: [9]"), "2: model.kind: is missing; expected mlp, cnn, resnet, inception or module"),
    (IMAGES.replace("kind: mlp", "kind: resnet, depth: 20, itit: he"),
     "2: model.itit: unknown key; did you mean init?"),
    (model("knid: mlp"), "2: model.knid: unknown key; did you mean kind?"),
    (BASE.replace("source", "sorce"), "1: data.sorce: unknown key; did you mean source?"),
    (model("kind: mlp, activation: rleu"),
     '2: model.activation: expected sigmoid, tanh, relu, leaky_relu or gelu, found "rleu"; did you mean relu?'),
    (IMAGES.replace("kind: mlp", "kind: resnet, depth: 21"),
     "2: model.depth: expected 18, 20, 32, 34, 44, 50, 56 or 110, found 21"),
    # types
    (optimizer("kind: sgd, lr: fast"), '3: optimizer.lr: expected a number, found "fast"'),
    (optimizer("kind: sgd, lr: '0.1'"), '3: optimizer.lr: expected a number, found "0.1"'),
    (optimizer("kind: sgd, lr: true"), "3: optimizer.lr: expected a number, found true"),
    (optimizer("kind: sgd, lr:"), "3: optimizer.lr: expected a number, found nothing"),
    (train("steps: 1.5"), "4: train.steps: expected a whole number of steps or {epochs: n}, found 1.5"),
    (train("steps: 1e3"), "4: train.steps: expected a whole number of steps or {epochs: n}, found 1000.0"),
    (train("steps: 100, compile: yes"), '4: train.compile: expected true or false, found "yes"'),
    (model("kind: mlp, hidden: 100"), "2: model.hidden: expected a list, found 100"),
    (model("kind: mlp, hidden: {a: 1}"), "2: model.hidden: expected a list, found a mapping"),
    (model("kind: mlp, hidden: [9, x]"), '2: model.hidden.2: expected a whole number, found "x"'),
    (model("kind: mlp, hidden: [0]"), "2: model.hidden.1: expected at least 1, found 0"),
    (train("steps: 100, target: 0.95"), "4: train.target: expected a mapping, found 0.95"),
    (BASE.replace("{source: synthetic}", "{source: npz, path: 7}"), "1: data.path: expected text, found 7"),
    (optimizer(f'kind: sgd, lr: {"x" * 500}'), f'3: optimizer.lr: expected a number, found "{"x" * 49} ...'),
    (BASE.replace("{steps: 100}", "[100]"), "4: train: expected a mapping, found a list"),
    (train("steps: {epochs:2}"), "4: train.steps: write a space after the colon: epochs: 2"),
    (BASE.replace("{kind: mlp}", "{kind:mlp}"), "2: model: write a space after the colon: kind: mlp"),
    # fields of the kind that a section has where it is left out
    (BASE + "norm: {init_weight: 3}\n", "5: norm.init_weight: the norm is none, which has no init_weight; it belongs "
     f"to {NORMS.removeprefix('none, ')}; set the kind too"),
    (BASE + "schedule: {gamma: 0.5, warmup: 3}\n", "5: schedule.gamma: the schedule is constant, which has no gamma; "
     "it belongs to exponential or step; set the kind too"),
    # ranges
    (optimizer("kind: sgd, lr: -1"), "3: optimizer.lr: expected a number above 0, found -1"),
    (train("steps: 0"), "4: train.steps: expected at least 1, found 0"),
    (optimizer("kind: sgd, lr: 1, momentum: 1"), "3: optimizer.momentum: expected a number below 1, found 1"),
    (train("steps: 100, population_batches: 20"),
     "4: train.population_batches: has no effect without population_statistics: precise"),
    (BASE + "seeds: {tune: 1001}\n", "5: seeds.tune: expected at most 1000, found 1001"),
    (optimizer("kind: sgd, lr: .inf"), "3: optimizer.lr: expected a finite number, found Infinity"),
    (optimizer("kind: sgd, lr: .nan"), "3: optimizer.lr: expected a finite number, found NaN"),
    (model("kind: mlp, hidden: []"), "2: model.hidden: expected a list of at least 1, found an empty list"),
    (optimizer("kind: adam, lr: 1, betas: [0, 0, 0]"),
     "3: optimizer.betas: expected a list of at most 2, found a list"),
    (optimizer("kind: adam, lr: 1, betas: [0]"), "3: optimizer.betas.2: is missing"),
    (BASE.replace("{source: synthetic}", "{source: digits, held_out: 1797}"),
     "1: data.held_out: expected a number below 1797, found 1797"),
    # fields of one section that do not go together
    (model("kind: mlp, init: gaussian"), "2: model.init: gaussian weights need a std"),
    (model("kind: mlp, init: {kind: he, std: 0.1}"), "2: model.init: std belongs to gaussian weights, not to he"),
    (optimizer("kind: sgd, lr: 0.1, nesterov: true"), "3: optimizer: nesterov needs a momentum above 0"),
    (train("steps: 100, target: {value: 95}"), "4: train.target: accuracy is a share of 1: write 0.95 for 95 %"),
    (model("kind: module, module: mine"), '2: model.module: expected package.module:function, found "mine"'),
    (model("kind: module, module: my.net:make"),
     "2: model.module: my.net:make is your own code, which would be executed; allow it with allow_code=True"),
    # sections that do not go together
    (model("kind: cnn"),
     "2: model.kind: a cnn needs images and the data are vectors; give data.shape as [channels, height, width]"),
    (model("kind: resnet, depth: 20").replace("{source: synthetic}", "digits"),
     "2: model.kind: a resnet needs images and the data are vectors; set data.images: true"),
    (SMALL + "norm: {kind: group, groups: 4}\n", "5: norm.groups: 4 groups do not divide a layer of 10 channels"),
    (BASE + "norm: instance\n",
     "5: norm.kind: instance norm has one value to average over in a layer of 100 channels: constant output"),
    (train("steps: 100, evaluate_every: 101"),
     "4: train.evaluate_every: is larger than the budget of 100 steps: no evaluation would happen"),
    (train("steps: 100, batch_size: 2001"), "4: train.batch_size: is larger than the 2000 training examples"),
    (train("steps: 100, batch_size: 1") + "norm: batch\n",
     "4: train.batch_size: batch norm has one value to average over in a layer of 100 channels: constant output"),
    # epochs in place of steps
    (train("steps: {epoch: 3}"),
     "4: train.steps: expected a whole number of steps or {epochs: n}, found epoch; did you mean epochs?"),
    (train("steps: 9, evaluate_every: {points_per_doubling: {epochs: 1}}"),
     "4: train.evaluate_every.points_per_doubling: expected a whole number, found a mapping"),
    (train("steps: 9, epochs: 3"), "4: train.epochs: unknown key; write steps: {epochs: n}"),
    (train("steps: {epochs: -1}"), "4: train.steps: expected a number of epochs above 0, found -1"),
    (train("steps: {epochs: 3, batch_size: 9}"),
     "4: train.steps: expected a whole number of steps or {epochs: n}, found batch_size"),
    (train("steps: 9, evaluate_every: {epochs: many}"),
     '4: train.evaluate_every: expected a number of epochs above 0, found "many"'),
    (train("steps: 9, evaluate_every: {epoch: 3}"),
     "4: train.evaluate_every: expected a whole number of steps or {epochs: n}, found epoch; did you mean epochs?"),
    (BASE + "schedule: {warmup: {epochs: 0}}\n",
     "5: schedule.warmup: expected a number of epochs above 0, found 0"),
    (BASE + "schedule: {kind: step, milestones: [{epochs: true}]}\n",
     "5: schedule.milestones.1: expected a number of epochs above 0, found true"),
    (BASE + "probes: {at: {epochs: false}}\n",
     "5: probes.at: expected a number of epochs above 0, found false"),
    (train("steps: {epochs: 3}, batch_size: {epochs: 3}"),
     "4: train.batch_size: expected a whole number, found a mapping"),
    (train("steps: {epochs: 3}").replace("{source: synthetic}", "{source: hub, name: x, shape: [3, 8, 8], classes: 2}"),
     "4: train.steps: its epochs cannot be counted in steps: the number of training examples is not known before they "
     "are loaded; give it as data.examples"),
    (train("steps: {epochs: 3}, batch_size: 2001"),
     "4: train.steps: its epochs cannot be counted in steps: a batch of 2001 is larger than the 2000 training "
     "examples"),
    (BASE.replace("{steps: 100}", "[100]") + "schedule: {warmup: {epochs: 1}}\n",
     "4: train: expected a mapping, found a list"),
    (train("steps: {epochs: 3}").replace("{source: synthetic}", "{source: npz, path: no.npz}"),
     "4: train.steps: its epochs cannot be counted in steps: data.path: no.npz does not exist; create it with "
     "numpy.savez('no.npz', x=..., y=...)"),
    (train("steps: {epochs: 3}") + "arms: {a: {train: {evaluate_every: {epochs: 1}}}}\ngrid: {train.batch_size: [9]}\n",
     "6: grid.train.batch_size: the steps of an epoch depend on it; give arms.a.train.evaluate_every or train.steps in "
     "steps, not in epochs"),
    (train("steps: {epochs: 3}") + "norm: {kind: frozen, after: {epochs: 1}}\ngrid: {train.accumulate: [1, 2]}\n",
     "6: grid.train.accumulate: the steps of an epoch depend on it; give norm.after in steps, not in epochs"),
    (BASE + "grid: {schedule.warmup: [0, {epochs: 1}]}\n",
     "5: grid.schedule.warmup.2: a grid takes steps, not epochs"),
    (BASE + "grid: {train.stop_at_target: [true, false]}\n",
     "5: grid.train.stop_at_target: steps to target do not depend on it, so it cannot be tuned; set it in the base or "
     "in an arm"),
    (BASE + "probes: all\ngrid: {probes.at: [1, 2]}\n",
     "6: grid.probes.at: steps to target do not depend on it, so it cannot be tuned; set it in the base or in an arm"),
    # probes
    (BASE + "probes:\n  - inputs\n  - drift\n", f'7: probes.measure.2: expected {PROBES}, found "drift"; '
     "did you mean shift?"),
    (BASE + "probes: {measure: input}\n", f'5: probes.measure.1: expected {PROBES}, found "input"; '
     "did you mean inputs?"),
    (BASE + "probes: {measure: []}\n", "5: probes.measure: expected a list of at least 1, found an empty list"),
    (BASE + "probes: false\n",
     f"5: probes: expected {PROBES.replace(' or', ',')}, a list or a mapping, found false"),
    # options of training
    (train("steps: 100, batch_size: 60, accumulate: 7"),
     "4: train.accumulate: a batch of 60 does not split into 7 equal micro-batches"),
    (train("steps: 100, batch_size: 8, accumulate: 8") + "norm: batch\n",
     "4: train.accumulate: batch norm has one value to average over in a layer of 100 channels: constant output"),
    (train("steps: 100, clip_gradients: 0"), "4: train.clip_gradients: expected a number above 0, found 0"),
    (train("steps: 100, label_smoothing: 1"), "4: train.label_smoothing: expected a number below 1, found 1"),
    (BASE + "schedule: {kind: step, milestones: [30, 20]}\n", "5: schedule.milestones: "
                                                              "expected steps in increasing order"),
    (BASE.replace("synthetic", "synthetic, shape: [8, 8]"),
     "1: data.shape: expected [features] or [channels, height, width]"),
    (train("steps: 100, memory_format: channels_last"),
     "4: train.memory_format: channels_last is for images and the data are vectors"),
    # arms
    (BASE + "arms: {a: 3}\n", "5: arms.a: expected a mapping, found 3"),
    (BASE + "arms: {model: mlp}\n", '5: arms.model: expected a mapping, found "mlp"'),
    (BASE + "arms:\n", "5: arms: expected a mapping, found nothing"),
    (BASE + "arms:\n  a/b: {}\n", '6: arms.a/b: expected a name of letters, digits, spaces, +, - and _, found "a/b"'),
    (BASE + f'arms:\n  {"a" * 41}: {{}}\n', f'6: arms.{"a" * 41}: expected at most 40 characters, found "{"a" * 41}"'),
    (ARMS + "  c:\n    norm: bacth\n", f'9: arms.c.norm.kind: expected {NORMS}, found "bacth"; did you mean batch?'),
    (ARMS + "  c: {grid: {}}\n", f"8: arms.c.grid: unknown key; expected {SECTIONS}"),
    (ARMS + "  c: {model: {hidden: [9]}, norm: group}\n",
     "8: arms.c.norm.groups: 4 groups do not divide a layer of 9 channels"),
    (SMALL + "norm: {kind: group, groups: 2}\narms:\n  a:\n    model: {hidden: [9]}\n",
     "7: arms.a.norm.groups: 2 groups do not divide a layer of 9 channels"),
    # reference
    (BASE + "arms: {plain: , norm: {norm: batch}}\nreference: plian\n",
     "6: reference: there is no arm plian; did you mean plain?"),
    (ARMS + "reference: plain\n", "8: reference: there is no arm plain; expected a or b"),
    (BASE + "reference: plain\n", "5: reference: there is no arm plain; the recipe has no arms"),
    (ARMS + "reference: 3\n", "8: reference: expected text, found 3"),
    # grid
    (ARMS + "grid: [1]\n", "8: grid: expected a mapping, found a list"),
    (ARMS + "grid: {optimizer.lrr: [1, 2]}\n", "8: grid.optimizer.lrr: unknown key; did you mean lr?"),
    (ARMS + "grid: {optimiser.lr: [1, 2]}\n", "8: grid.optimiser.lr: unknown key; did you mean optimizer?"),
    (ARMS + "grid: {norm.eps: [1, 2]}\n",
     f"8: grid.norm.eps: in arm a: unknown key; it belongs to {NORMS_WITH_EPS}, not to none"),
    (ARMS + "grid: {optimizer.lr.x: [1]}\n", "8: grid.optimizer.lr.x: expected a number, found a mapping"),
    (model("kind: cnn, channels: [4]").replace("synthetic", "synthetic, shape: [1, 8, 8]")
     + "grid: {model.arguments.x: [1]}\n",
     "5: grid.model.arguments.x: unknown key; it belongs to module, not to cnn"),
    (ARMS + "grid: {optimizer.lr: 1}\n", "8: grid.optimizer.lr: expected a list, found 1"),
    (ARMS + "grid: {optimizer.lr: []}\n", "8: grid.optimizer.lr: expected a list of at least 1, found an empty list"),
    (ARMS + "grid: {optimizer.lr: [1, -2]}\n", "8: grid.optimizer.lr.2: expected a number above 0, found -2"),
    (ARMS + "grid: {model.hidden: [[9], [9, 0]]}\n", "8: grid.model.hidden.2.2: expected at least 1, found 0"),
    (ARMS + "grid: {optimizer.lr: [1, 2, 1.0]}\n", "8: grid.optimizer.lr.3: 1.0 appears twice"),
    (ARMS + "grid: {optimizer.nesterov: [false, true]}\n",
     "8: grid.optimizer.nesterov.2: in optimizer: nesterov needs a momentum above 0"),
    (ARMS + "grid: {train.batch_size: [10, 3000]}\n",
     "8: grid.train.batch_size.2: is larger than the 2000 training examples"),
    (SMALL + "norm: {kind: group, groups: 2}\ngrid: {model.hidden: [[4], [5]]}\n",
     "6: grid.model.hidden.2: in norm.groups: 2 groups do not divide a layer of 5 channels"),
    (SMALL + "norm: {kind: group, groups: 2}\narms:\n  a:\n  b: {model: {hidden: [8]}}\ngrid: {norm.groups: [2, 4]}\n",
     "9: grid.norm.groups.2: in arm a: 4 groups do not divide a layer of 10 channels"),
    (ARMS + "grid: {optimizer.lr: {log: [1, 2], points: 1}}\n",
     "8: grid.optimizer.lr.points: expected at least 2, found 1"),
    (ARMS + "grid: {optimizer.lr: {log: [0, 2], points: 3}}\n",
     "8: grid.optimizer.lr.log.1: expected a number above 0, found 0"),
    (ARMS + "grid: {optimizer.lr: {log: [1, .inf], points: 3}}\n",
     "8: grid.optimizer.lr.log.2: expected a finite number, found Infinity"),
    (ARMS + "grid: {optimizer.lr: {log: [3, 2], points: 3}}\n",
     "8: grid.optimizer.lr: log: 3 is not less than 2; the lowest value comes first"),
    (ARMS + "grid: {optimizer.lr: {log: [1, 1.01], points: 3}}\n", "8: grid.optimizer.lr.2: 1 appears twice"),
    (ARMS + "grid: {optimizer.lr: {log: [1, 2], point: 3, points: 3}}\n",
     "8: grid.optimizer.lr.point: unknown key; did you mean points?"),
    (ARMS + "grid: {norm: [batch, layer]}\n", "8: grid.norm: chooses a whole section; make each choice an arm"),
    (ARMS + "grid: {norm.kind: [batch, layer]}\n",
     "8: grid.norm.kind: chooses a whole section; make each choice an arm"),
    (ARMS + "grid: {train.seed: [1, 2]}\n",
     "8: grid.train.seed: is the same for every run of a comparison, so it cannot be tuned"),
    (ARMS + "grid: {data.noise: [1, 2]}\n",
     "8: grid.data.noise: is the same for every run of a comparison, so it cannot be tuned"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ONE_MISTAKE, ids=[message for _, message in ONE_MISTAKE])
def test_a_mistake_is_refused_with_its_place_and_what_was_expected(
    mistakes_of: MistakesOf, text: str, message: str
) -> None:
    assert mistakes_of(text) == (f"r.yaml:{message}",)


# --- several ------------------------------------------------------------------------------------------------------

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

SEVERAL = [
    ("# a comment\nseeds: {tune: 1}\n", [f"2: {name}: is missing" for name in ("data", "model", "optimizer", "train")]),
    ("data:\nmodel:\noptimizer:\ntrain:\n", [
        "1: data: expected digits, mnist, synthetic, npz, hub or a mapping, found nothing",
        "2: model: expected mlp, cnn, resnet, inception, module or a mapping, found nothing",
        "3: optimizer: expected sgd, adam, adamw or a mapping, found nothing",
        "4: train: expected a mapping, found nothing",
    ]),
    # the rest of a section is checked as the kind that was probably meant
    (model("kind: mpl, hiden: [9], init: {kind: xvaier}"), [
        '2: model.kind: expected mlp, cnn, resnet, inception or module, found "mpl"; did you mean mlp?',
        '2: model.init.kind: expected gaussian, xavier, he, orthogonal or lsuv, found "xvaier"; did you mean xavier?',
        "2: model.hiden: unknown key; did you mean hidden?",
    ]),
    # and its keys as those of any kind where none can be guessed
    (model("kind: transformer, hiden: [9], depth: 20"), [
        '2: model.kind: expected mlp, cnn, resnet, inception or module, found "transformer"',
        "2: model.hiden: unknown key; did you mean hidden?",
    ]),
    # what arms inherit from the base is said once
    (optimizer("kind: sgd, lr: -1, momentun: 3") + "arms: {a: {norm: batch}, b: {optimizer: {momentum: 0.5}}}\n", [
        "3: optimizer.lr: expected a number above 0, found -1",
        "3: optimizer.momentun: unknown key; did you mean momentum?",
    ]),
    (BASE + "norm: instance\narms: {a: , b: {optimizer: adam}}\n", [
        "5: norm.kind: instance norm has one value to average over in a layer of 100 channels: constant output",
    ]),
    (model("kind: module, module: a:b") + "arms: {a: , b: {norm: batch}}\n", [
        "2: model.module: a:b is your own code, which would be executed; allow it with allow_code=True",
    ]),
    # also where every arm repairs it
    (optimizer("kind: sgd, lr: -1") + "arms: {a: {optimizer: {lr: 1}}}\n", [
        "3: optimizer.lr: expected a number above 0, found -1",
    ]),
    # what several arms have on their own is said of each
    (BASE + "arms:\n  a: {optimizer: {lr: 0}}\n  b: {optimizer: {lr: 0}}\n", [
        "6: arms.a.optimizer.lr: expected a number above 0, found 0",
        "7: arms.b.optimizer.lr: expected a number above 0, found 0",
    ]),
    # an arm that fixes a field of the grid does not have it checked
    (BASE + "arms: {a: {train: {batch_size: 5}}, b: }\ngrid: {train.batch_size: [10, 3000]}\n", [
        "6: grid.train.batch_size.2: is larger than the 2000 training examples",
    ]),
    (EIGHT, [
        "1: data.held_out: expected a number below 1797, found 1800",
        "4: model.hiden: unknown key; did you mean hidden?",
        '5: model.activation: expected sigmoid, tanh, relu, leaky_relu or gelu, found "sigmod"; did you mean sigmoid?',
        f'6: norm.kind: expected {NORMS}, found "no"; did you mean none or noisy?',
        "7: optimizer.lr: expected a number above 0, found -1",
        '9: train.steps: expected a whole number of steps or {epochs: n}, found "many"',
        "12: arms.twice.optimizer.momentum: expected a number below 1, found 2",
        "13: arms.twice: appears twice; the first is in r.yaml:12",
        "14: reference: there is no arm plan; did you mean plain?",
        "16: grid.optimizer.lr.2: 1 appears twice",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages"), SEVERAL)
def test_all_mistakes_are_found_in_one_pass_and_named_in_order(
    mistakes_of: MistakesOf, text: str, messages: list[str]
) -> None:
    assert mistakes_of(text) == tuple(f"r.yaml:{message}" for message in messages)


def test_mistakes_of_flags_come_after_those_of_the_file(mistakes_of: MistakesOf) -> None:
    *_, last, of_flag = mistakes_of(EIGHT, "seeds.tune=0")
    assert last == "r.yaml:16: grid.optimizer.lr.2: 1 appears twice"
    assert of_flag == "sets seeds.tune=0: seeds.tune: expected at least 1, found 0"


def test_a_model_of_the_users_own_is_accepted_where_its_code_is_allowed(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(model("kind: module, module: a:b") + "arms: {a: , b: {norm: batch}}\n", allow_code=True) == ()


# --- claims -------------------------------------------------------------------------------------------------------

TWO_ARMS = (
    BASE.replace("steps: 100", "steps: 100, target: {value: 0.9}") + "arms: {plain: , batch norm: {norm: batch}}\n"
)
SEARCH = "largest_learning_rate: {steps: 300, accuracy: 0.8}\n"
CLAIM = {"say": '"batch norm allows higher learning rates"', "measure": "largest_learning_rate", "arm": "batch norm",
         "over": "plain", "at_least": 1}  # fmt: skip


def claiming(*claims: dict[str, object]) -> str:
    """The section with these claims, one a line, as changes of a right one; None leaves a key out."""
    lines = [", ".join(f"{k}: {v}" for k, v in {**CLAIM, **each}.items() if v is not None) for each in claims]
    return "claims:\n" + "".join(f"  - {{{line}}}\n" for line in lines)


@pytest.mark.parametrize(
    ("claim", "mistake"),
    [
        ({}, None),
         ({"at_least": None, "at_lest": 1}, "claims.1.at_lest: unknown key; did you mean at_least or at_most?"),
         ({"expect": "more"}, "claims.1: give only one of at_least, expect"),
         ({"at_least": None}, "claims.1: needs one of at_least, at_most, expect"),
        ({"at_least": None, "expect": "mor"},
         'claims.1.expect: expected more or less, found "mor"; did you mean more?'),
        ({"arm": "batchnorm"}, "claims.1.arm: there is no arm batchnorm; did you mean batch norm?"),
        ({"over": "plan"}, "claims.1.over: there is no arm plan; did you mean plain?"),
        ({"over": "batch norm"}, "claims.1.over: is the same arm as arm, batch norm; a claim compares two"),
        ({"at_least": 0}, "claims.1.at_least: largest_learning_rate is compared as a ratio: "
                          "expected a number above 0, found 0"),
        ({"when": "end"}, "claims.1.when: largest_learning_rate has one value for a run; leave when out"),
        ({"measure": "final", "at_least": -0.1, "layer": "hidden1"},
         "claims.1.layer: final has no layers; leave layer out"),
        ({"measure": "shift.cosine"}, "claims.1.measure: the probe shift is not measured in arm batch norm and plain; "
                                      "add shift to probes.measure"),
        ({"measure": "final", "at_most": -1.5, "at_least": None},
         "claims.1.at_most: a difference of final is within -1 and 1, found -1.5"),
    ],
)  # fmt: skip
def test_a_wrong_claim_is_refused_at_its_key(
    mistakes_of: MistakesOf, claim: dict[str, object], mistake: str | None
) -> None:
    expected = () if mistake is None else (f"r.yaml:7: {mistake}",)
    assert mistakes_of(TWO_ARMS + claiming(claim) + SEARCH * ("measure" not in claim)) == expected


@pytest.mark.parametrize(
    ("measure", "grid", "wrong"),
    [("final", "", True), ("steps_to_target", "", True), ("steps_to_target", "grid: {optimizer.lr: [1, 2]}\n", False)],
)
def test_a_claim_needs_more_than_one_pair_of_runs(
    mistakes_of: MistakesOf, measure: str, grid: str, wrong: bool
) -> None:
    text = TWO_ARMS + "seeds: {report: 1}\n" + claiming({"measure": measure, "at_least": 1.0}) + grid
    why = f"r.yaml:6: seeds.report: {measure} is judged by pairs of runs, one a seed: expected at least 2"
    assert mistakes_of(text) == ((why,) if wrong else ())


def test_a_misspelt_measure_has_the_right_one_suggested(mistakes_of: MistakesOf) -> None:
    (found,) = mistakes_of(TWO_ARMS + claiming({"measure": "step_to_target"}))
    assert found == (
        f"r.yaml:7: claims.1.measure: expected one of {len(MEASURES)} names, "
        'found "step_to_target"; did you mean steps_to_target or seconds_to_target?'
    )
    (found,) = mistakes_of(TWO_ARMS + claiming({"measure": "speed"}))
    assert found.startswith("r.yaml:7: claims.1.measure: expected steps_to_target, ")


@pytest.mark.parametrize("claims", ["4", "true", "text", "{a: 1}"])
def test_claims_that_are_no_list_are_refused_beside_a_search(mistakes_of: MistakesOf, claims: str) -> None:
    found = mistakes_of(f"{TWO_ARMS}claims: {claims}\nlargest_learning_rate: {{steps: 10, accuracy: 0.8}}\n")
    assert found[0].startswith("r.yaml:6: claims: expected a list, found ")


def test_the_mistakes_of_all_claims_are_found_in_one_pass(mistakes_of: MistakesOf) -> None:
    text = TWO_ARMS + claiming({}, {"arm": "bach norm", "measure": "final"}, {"measure": "final", "at_lest": 1})
    assert mistakes_of(text) == (
        "r.yaml:7: claims.1.measure: needs the section largest_learning_rate, as in {steps: 300, accuracy: 0.8}",
        "r.yaml:8: claims.2.arm: there is no arm bach norm; did you mean batch norm?",
        "r.yaml:9: claims.3.at_lest: unknown key; did you mean at_least or at_most?",
    )


@pytest.mark.parametrize(
    ("probes", "arms"),
    [("all", []), ("[gradients]", ["batch norm", "plain"]), ("[shift, scale]", [])],
)
def test_a_claim_is_about_what_both_arms_measure(mistakes_of: MistakesOf, probes: str, arms: list[str]) -> None:
    text = (
        TWO_ARMS + f"probes: {{measure: {probes}}}\n" + claiming({"measure": "shift.cosine", "layer": "hidden1.linear"})
    )
    missing = f"the probe shift is not measured in arm {' and '.join(arms)}; add shift to probes.measure"
    assert mistakes_of(text) == ((f"r.yaml:8: claims.1.measure: {missing}",) if arms else ())


def test_the_covariance_of_activations_that_are_not_normalized_is_no_measure(mistakes_of: MistakesOf) -> None:
    text = TWO_ARMS + "probes: all\n" + claiming({"measure": "whitening.off_diagonal"})
    why = "arm plain has no norm; the covariance of its activations depends on their scale"
    assert mistakes_of(text) == (f"r.yaml:8: claims.1.measure: {why}",)


def test_a_search_without_a_claim_about_it_and_a_probe_named_twice_are_refused(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(TWO_ARMS + SEARCH + "probes: [shift, inputs, shift]\n") == (
        "r.yaml:6: largest_learning_rate: no claim is about it, so no search is made; add one, or leave it out",
        "r.yaml:7: probes.measure: names the same probe twice",
    )


def test_a_claim_says_something(mistakes_of: MistakesOf) -> None:
    text = TWO_ARMS + claiming({"measure": "final", "at_least": 0.1, "say": "''"})
    assert mistakes_of(text) == ('r.yaml:7: claims.1.say: expected some text, found ""',)


def test_a_layer_that_an_arms_model_does_not_have_is_refused(mistakes_of: MistakesOf) -> None:
    text = TWO_ARMS + "probes: all\n" + claiming({"measure": "shift.cosine", "layer": "hiden1.linear"})
    hint = "did you mean hidden1.linear or hidden3.linear?"
    assert mistakes_of(text) == tuple(
        f"r.yaml:8: claims.1.layer: arm {arm} has no layer hiden1.linear; {hint}" for arm in ("batch norm", "plain")
    )


def test_a_probe_that_only_one_arm_measures_is_refused_with_the_other(mistakes_of: MistakesOf) -> None:
    text = TWO_ARMS.replace("plain: ", "plain: {probes: {measure: [shift]}}") + claiming({"measure": "shift.distance"})
    (found,) = mistakes_of(text)
    assert "is not measured in arm batch norm; add shift" in found


@pytest.mark.parametrize(
    ("plain", "claim", "mistake"),
    [
        ("probes: {measure: all}", {"measure": "saturation.share"},
         "measure: saturation.share is of sigmoid or tanh, and arm plain has relu"),
        ("probes: {measure: all}, model: {activation: tanh}", {"measure": "saturation.dead"},
         "measure: saturation.dead is of relu, and arm plain has tanh"),
        ("probes: {measure: all}", {"measure": "scale.effective_learning_rate"},
         "measure: arm plain has no norm in which the scale of a weight has no effect"),
        ("probes: {measure: all}, norm: dyt", {"measure": "scale.effective_learning_rate"},
         "measure: arm plain has no norm in which the scale of a weight has no effect"),
        ("probes: {measure: all}, train: {label_smoothing: 0.1}", {"measure": "shift.distance", "when": "equal loss"},
         "when: losses with different train.label_smoothing are not comparable"),
        ("norm: {kind: renorm, warmup: 400}, train: {steps: 500}", {},
         "measure: in arm plain, with the 300 steps of largest_learning_rate: norm.warmup 400: all 300 batches of "
         "the budget would be plain batch norm; set warmup, and r_steps and d_steps, to less"),
        ("schedule: {warmup: 300}", {},
         "measure: in arm plain, schedule.warmup 300 is no less than the 300 steps of largest_learning_rate"),
        ("train: {evaluate_every: 90}", {}, None),
    ],
)  # fmt: skip
def test_a_claim_about_what_an_arm_cannot_measure_is_refused(
    mistakes_of: MistakesOf, plain: str, claim: dict[str, object], mistake: str | None
) -> None:
    probes = "probes: {measure: all}, norm: batch" if "probes" in plain else "norm: batch"
    if claim.get("measure") == "saturation.share":
        probes += ", model: {activation: sigmoid}"
    text = TWO_ARMS.replace("plain: ", f"plain: {{{plain}}}").replace("{norm: batch}", f"{{{probes}}}")
    search = SEARCH.replace("300", "50" if mistake is None else "300") * ("measure" not in claim)
    found = mistakes_of(text + claiming(claim) + search)
    assert found == (() if mistake is None else (f"r.yaml:7: claims.1.{mistake}",))


@pytest.mark.parametrize(
    ("plain", "mistake"),
    [("schedule: {warmup: x}", 'schedule.warmup: expected a whole number of steps or {epochs: n}, found "x"'),
     ("train: {label_smoothing: []}", "train.label_smoothing: expected a number, found an empty list"),
     ("model: 4", "model.kind: expected mlp, cnn, resnet, inception or module, found 4")],
)  # fmt: skip
def test_what_is_wrong_in_an_arm_is_noted_once_and_no_claim_trips_over_it(
    mistakes_of: MistakesOf, plain: str, mistake: str
) -> None:
    text = TWO_ARMS.replace("plain: ", f"plain: {{{plain}}}") + claiming({}) + SEARCH
    assert mistakes_of(text) == (f"r.yaml:5: arms.plain.{mistake}",)


def test_a_claim_needs_arms_and_one_on_steps_a_target(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(BASE + claiming({}) + SEARCH) == (
        "r.yaml:5: claims: the recipe has no arms; a claim is about two of them",
    )
    text = TWO_ARMS.replace(", target: {value: 0.9}", "") + claiming({"measure": "steps_to_target"})
    assert mistakes_of(text) == ("r.yaml:7: claims.1.measure: needs train.target",)


# --- spelling -----------------------------------------------------------------------------------------------------


def test_the_nearest_name_is_suggested_or_else_those_that_the_word_begins() -> None:
    names = ["batch", "layer", "evaluate_every", "evaluate_often"]
    assert nearest("bathc", names) == ["batch"]
    assert nearest("itit", ["kind", "init"]) == ["init"]
    assert nearest("eval", names) == ["evaluate_every", "evaluate_often"]
    assert nearest("transformer", names) == nearest(3, names) == []
    assert suggestion("transformer", names[:3]) == "expected batch, layer or evaluate_every"


LETTERS = string.ascii_lowercase + "_"


def typos(word: str, letters: str = LETTERS) -> set[str]:
    """Every word of one mistyped letter: left out, added or replaced, or two swapped."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    left_out = {before + after[1:] for before, after in cuts if after}
    added = {before + letter + after for before, after in cuts for letter in letters}
    replaced = {before + letter + after[1:] for before, after in cuts if after for letter in letters}
    swapped = {before + after[1] + after[0] + after[2:] for before, after in cuts if len(after) > 1}
    return (left_out | added | replaced | swapped) - {word, ""}


class Place(NamedTuple):
    """A section of the models: its path, the kinds of the sections around it, its own kind, and its keys."""

    path: tuple[str | int, ...]
    around: tuple[dict[str, str], ...]
    kind: dict[str, str]
    keys: tuple[str, ...]

    def holding(self, section: dict[str, Any]) -> str:
        """The recipe with nothing but this section."""
        for key, kind in zip(reversed(self.path), reversed(self.around), strict=True):
            section = [section] if isinstance(key, int) else {**kind, key: section}
        return dump(section)

    def field(self, key: str) -> str:
        return dotted((*self.path, key))


def places(model: type[BaseModel], *path: str | int, around: tuple[dict[str, str], ...] = ()) -> Iterator[Place]:
    """Every section that the models know, at every level and of every kind."""
    kind = {key: kind for kind in kinds([model]) for key in KINDS if key in model.model_fields}
    yield Place(path, around, kind, tuple(model.model_fields))
    for name, field in model.model_fields.items():
        in_list = field.get_default() == ()
        for member in members(field.annotation):
            yield from places(member, *path, name, *[0] * in_list, around=(*around, kind, *[{}] * in_list))


PLACES = list(places(RecipeFile))


def suggested(mistake: str) -> list[str]:
    return mistake.split(": unknown key; did you mean ")[1].removesuffix("?").replace(" or ", ", ").split(", ")


def test_the_places_hold_every_section_and_level() -> None:
    named = {*RecipeFile.model_fields, "model.init", "train.target"} - {"arms", "reference", "grid"}
    assert {dotted(place.path).removesuffix(".1") for place in PLACES} >= named
    assert sum(len(place.keys) for place in PLACES) > 80


@pytest.mark.parametrize("letters", ["e", pytest.param(LETTERS, marks=pytest.mark.slow)], ids=["e", "all letters"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(map(str, (*place.path, *place.kind.values()))))
def test_every_one_letter_typo_of_every_key_has_the_key_suggested(
    mistakes_of: MistakesOf, place: Place, letters: str
) -> None:
    for key in place.keys:
        wrong = sorted(typos(key, letters) - set(place.keys))
        for some in (wrong[first : first + 40] for first in range(0, len(wrong), 40)):
            section: dict[str, Any] = {name: kind for name, kind in place.kind.items() if name != key}
            section |= dict.fromkeys(some, place.kind.get(key))  # a misspelt `kind` still holds the kind
            found = {mistake.split(": ")[1]: mistake for mistake in mistakes_of(place.holding(section))}
            for typo in some:
                assert key in suggested(found[place.field(typo)])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["file", "arm", "flag", "grid"]))
def test_a_typo_is_refused_wherever_a_key_can_stand(mistakes_of: MistakesOf, data: st.DataObject, where: str) -> None:
    place = data.draw(st.sampled_from(PLACES))
    key = data.draw(st.sampled_from(place.keys))
    typo = data.draw(st.sampled_from(sorted(typos(key) - set(place.keys))))
    with_typo = {**place.kind, typo: 1}
    if where == "file":
        found = mistakes_of(place.holding(with_typo))
    elif where == "flag":
        assume(0 not in place.path)  # a list is replaced as a whole
        found = mistakes_of(place.holding(place.kind), f"{place.field(typo)}=1")
    elif where == "arm":
        assume(place.path[0] in Recipe.model_fields if place.path else key in Recipe.model_fields)
        in_arm = textwrap.indent(place.holding(with_typo), "    ")
        found = mistakes_of(f"{BASE}arms:\n  a:\n{in_arm}")
    else:
        assume(
            place.path and place.path[0] in {*Recipe.model_fields} - {"data", "train", "probes"} and key not in KINDS
        )
        found = mistakes_of(place.holding(place.kind) + dump({"grid": {place.field(typo): [1]}}))
    hints = [mistake for mistake in found if f"{place.field(typo)}: unknown key; did you mean " in mistake]
    assert [key in suggested(hint) for hint in hints] == [True]


def test_a_shorthand_exists_for_exactly_the_sections_that_have_kinds_and_for_probes() -> None:
    sections = {place.path[-1]: bool(place.kind) for place in PLACES if place.path} | {"probes": True}
    assert {name for name in sections if shorthand_key(name)} == {name for name, has in sections.items() if has}
