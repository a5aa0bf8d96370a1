"""Recipes before they are checked: shorthands, arms on top of the base, and values that a flag sets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bncli.errors import RecipeError
from bncli.recipe.load import plain, with_values
from bncli.recipe.overrides import leaves
from tests.recipe.conftest import (
    BASE,
    NORMS,
    NORMS_WITH_EPS,
    OWN,
    SECTIONS,
    Load,
    MistakesOf,
    arm,
    given_fields,
    optimizer,
)

# --- shorthands and defaults --------------------------------------------------------------------------------------


def test_a_bare_name_stands_for_a_section_of_that_kind(loaded: Load) -> None:
    text = BASE.replace("{source: synthetic}", "digits").replace("{kind: mlp}", "{kind: mlp, init: xavier}")
    recipe = loaded(text + "norm: layer\n").base
    assert (recipe.data.source, recipe.norm.kind, recipe.model.kind) == ("digits", "layer", "mlp")
    assert plain(recipe)["model"]["init"] == {"kind": "xavier", "std": None}


def test_probes_may_be_a_bare_name_or_a_list_of_them_also_in_an_arm_and_a_flag(loaded: Load) -> None:
    text = BASE + "probes: all\narms: {a: {probes: [inputs, shift]}, b: {probes: }, c: {probes: {measure: scale}}}\n"
    found = loaded(text, "probes.at=7")
    assert plain(found.base)["probes"] == {"measure": ["all"], "at": 7}
    assert plain(arm(found, "a"))["probes"] == {"measure": ["inputs", "shift"], "at": 7}
    assert arm(found, "b").probes is None
    assert plain(arm(found, "c"))["probes"] == {"measure": ["scale"], "at": 7}
    assert loaded(text, "probes=[scale]").base == loaded(text, "probes=scale").base


def test_an_argument_of_an_own_model_is_no_section_whatever_its_name(loaded: Load) -> None:
    recipe = loaded(OWN.replace("width: 3", "norm: batch"), "model.arguments.init=he", allow_code=True).base
    assert plain(recipe)["model"]["arguments"] == {"norm": "batch", "depth": 2, "init": "he"}


def test_a_section_with_a_default_kind_may_leave_it_out(loaded: Load) -> None:
    assert plain(loaded(BASE + "schedule: {warmup: 9}\n").base)["schedule"] == {"kind": "constant", "warmup": 9}
    assert loaded(BASE, "schedule.warmup=9").base == loaded(BASE + "schedule: {warmup: 9}\n").base


# --- arms ---------------------------------------------------------------------------------------------------------


def test_an_arm_without_changes_is_the_base(loaded: Load) -> None:
    found = loaded(BASE + "arms:\n  a:\n  b: {}\n  c: {norm: none}\n")
    assert [arm.recipe for arm in found.arms] == [found.base] * 3


def test_an_arm_changes_the_fields_that_it_names_and_no_others(loaded: Load) -> None:
    found = loaded(BASE + "arms: {a: {optimizer: {momentum: 0.9}, train: {batch_size: 7}}}\n")
    expected = {"optimizer.momentum": 0.9, "train.batch_size": 7}
    assert arm(found, "a") == with_values(found.base, expected)


def test_an_arm_that_changes_a_kind_keeps_the_fields_that_both_kinds_have(loaded: Load) -> None:
    text = BASE.replace("lr: 0.1", "lr: 0.3, weight_decay: 0.01, momentum: 0.9, nesterov: true")
    optimizer = plain(arm(loaded(text + "arms: {a: {optimizer: adam}}\n"), "a"))["optimizer"]
    expected = {"lr": 0.3, "weight_decay": 0.01, "weight_decay_on": "all", "betas": [0.9, 0.999], "eps": 1e-8}
    assert optimizer == {"kind": "adam", **expected}


def test_an_arm_that_changes_the_initial_weights_drops_the_gaussian_deviation(loaded: Load) -> None:
    text = BASE.replace("{kind: mlp}", "{kind: mlp, init: {kind: gaussian, std: 0.1}}")
    found = loaded(text + "arms: {a: {model: {init: he}}, b: {model: {init: {std: 0.2}}}}\n")
    assert plain(arm(found, "a"))["model"]["init"] == {"kind": "he", "std": None}
    assert plain(arm(found, "b"))["model"]["init"] == {"kind": "gaussian", "std": 0.2}
    assert plain(loaded(text, "model.init=lsuv").base)["model"]["init"] == {"kind": "lsuv", "std": None}


def test_an_arm_may_change_one_argument_of_an_own_model(loaded: Load) -> None:
    found = loaded(OWN + "arms: {a: {model: {arguments: {width: 9}}}}\n", "model.arguments.depth=4", allow_code=True)
    assert plain(arm(found, "a"))["model"]["arguments"] == {"width": 9, "depth": 4}


def test_an_arm_may_have_the_name_of_a_section(loaded: Load) -> None:
    found = loaded(BASE + "arms: {norm: {norm: batch}, data: , model: {norm: layer}}\n")
    assert [arm.recipe.norm.kind for arm in found.arms] == ["batch", "none", "layer"]


def test_an_arm_that_gives_a_field_of_the_grid_fixes_it(loaded: Load) -> None:
    found = loaded(
        BASE + "arms: {a: , b: {optimizer: {lr: 5}}, c: {optimizer: adam}}\n"
        "grid: {optimizer.lr: [1, 2], train.batch_size: [10, 20]}\n"
    )
    assert [arm.fixed for arm in found.arms] == [(), ("optimizer.lr",), ()]


@pytest.mark.parametrize(
    ("ends", "points", "values"),
    [
        ("[0.01, 10]", 7, [0.01, 0.0316, 0.1, 0.316, 1, 3.16, 10]),
        ("[0.1, 0.3]", 2, [0.1, 0.3]),
        ("[1, 3]", 4, [1, 1.44, 2.08, 3]),
        ("[0.5, 2000]", 5, [0.5, 3.98, 31.6, 251, 2000]),
        ("[64, 4096]", 7, [64, 128, 256, 512, 1024, 2048, 4096]),
        ("[0.12345, 12.345]", 3, [0.12345, 1.23, 12.345]),
    ],
)
def test_values_of_the_grid_are_spaced_at_equal_ratios(
    loaded: Load, ends: str, points: int, values: list[float]
) -> None:
    spaced = f"{{log: {ends}, points: {points}}}"
    in_file = loaded(BASE + f"grid: {{optimizer.lr: {spaced}}}\n").file
    assert in_file.grid == {"optimizer.lr": tuple(values)}
    assert loaded(BASE, f"grid.optimizer.lr={spaced}").file == in_file
    assert loaded(BASE + "grid: {optimizer.lr: [5, 6]}\n", f"grid={{optimizer.lr: {spaced}}}").file == in_file
    replaced = loaded(BASE + f"grid: {{optimizer.lr: {spaced}}}\n", "grid.optimizer.lr=[1]").file
    assert replaced.grid == {"optimizer.lr": (1,)}


def test_whole_numbers_that_are_spaced_stay_whole(loaded: Load) -> None:
    found = loaded(BASE + "grid: {train.batch_size: {log: [16, 256], points: 5}}\n").file.grid["train.batch_size"]
    assert [(value, type(value)) for value in found] == [(value, int) for value in (16, 32, 64, 128, 256)]


def test_spaced_values_are_checked_as_a_list_is_each_at_its_place(mistakes_of: MistakesOf) -> None:
    text = BASE + "grid:\n  optimizer.momentum: {log: [0.1, 10], points: 3}\n"
    assert mistakes_of(text) == (
        "r.yaml:6: grid.optimizer.momentum.2: expected a number below 1, found 1",
        "r.yaml:6: grid.optimizer.momentum.3: expected a number below 1, found 10",
    )


def test_a_flag_can_change_add_and_empty_an_arm(loaded: Load) -> None:
    text = BASE + "arms: {a: {norm: {kind: group, groups: 2}}, b: {norm: batch}}\n"
    found = loaded(text, "arms.a.norm=layer", "arms.b.norm.eps=1e-3", "arms.c.train.batch_size=9", "arms.d=")
    norms = [plain(arm.recipe)["norm"] for arm in found.arms]
    assert [arm.name for arm in found.arms] == ["a", "b", "c", "d"]
    assert norms[0] == {"kind": "layer", "eps": 1e-5, "affine": True, "init_weight": 1.0}
    assert norms[1]["eps"] == 1e-3
    assert arm(found, "c").train.batch_size == 9
    assert arm(found, "d") == found.base


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        (" optimizer.lr = 3 ", "optimizer.lr", 3.0),
        ("optimizer={lr: 3}", "optimizer.lr", 3.0),
        ("model.hidden=[7, 8]", "model.hidden", [7, 8]),
        ("norm=batch", "norm.kind", "batch"),
        ("norm.kind=batch", "norm.kind", "batch"),
        ("norm={kind: batch, momentum: null}", "norm.momentum", None),
        ("train.target={value: 0.9}", "train.target.value", 0.9),
        ("train.target.value=0.9", "train.target.value", 0.9),
        ("model.init={kind: gaussian, std: 012}", "model.init.std", 12.0),
    ],
)
def test_a_flag_overrides_any_field(loaded: Load, flag: str, path: str, value: Any) -> None:
    found = {".".join(map(str, keys)): each for keys, each in leaves(plain(loaded(BASE, flag).base))}
    assert found[path] == value


def test_a_flag_goes_into_a_section_that_the_file_gives_by_its_bare_name(loaded: Load) -> None:
    assert plain(loaded(BASE + "norm: batch\n", "norm.eps=1e-3").base)["norm"]["eps"] == 1e-3


def test_of_two_flags_for_a_field_the_last_holds(loaded: Load) -> None:
    assert loaded(BASE, "train.seed=1", "train.seed=2").base.train.seed == 2


def test_a_flag_can_set_the_grid_the_seeds_and_the_reference(loaded: Load) -> None:
    text = BASE + "arms: {batch norm: {norm: batch}, plain: }\ngrid: {train.batch_size: [10, 20]}\n"
    file = loaded(text, "grid.optimizer.lr=[1, 2]", "seeds.tune=7", "reference=batch norm").file
    assert file.grid == {"train.batch_size": (10, 20), "optimizer.lr": (1, 2)}
    assert (file.seeds.tune, file.seeds.report, file.reference) == (7, 10, "batch norm")


def test_a_flag_for_all_arms_or_the_whole_grid_replaces_the_files(loaded: Load) -> None:
    text = BASE + "arms: {a: {norm: batch}, b: }\ngrid: {optimizer.lr: [1, 2]}\n"
    found = loaded(text, "arms={c: {norm: layer}}", "grid={}")
    assert [(arm.name, arm.recipe.norm.kind) for arm in found.arms] == [("c", "layer")]
    assert found.file.grid == {}
    assert given_fields(found, found.arms[0])["norm.kind"] == "sets arms={c: {norm: layer}}"


argument_texts = st.text("01.eE-+~nultrsf[]{},:#&*!|>'\"%@? a_=", max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argument_texts | st.sampled_from(["no", "012", "1e3", "1_000", "[1, no, 012]", "{a: 1e3}", "'", "a=b"]))
@example("[3e-4, no, 012, {a: ~}]")
def test_a_flag_reads_its_value_exactly_as_the_file_does(loaded: Load, text: str) -> None:
    def outcome(file: str, *flags: str) -> str:
        try:
            return repr(plain(loaded(file, *flags, allow_code=True).base))
        except RecipeError:
            return "refused"

    own = BASE.replace("model: {kind: mlp}", "model:\n  kind: module\n  module: a:b")
    in_file = outcome(own.replace("a:b", f"a:b\n  arguments:\n    x: {text}"))
    assert in_file == outcome(own, f"model.arguments.x={text}")
    assert in_file != "refused" or not text.isalnum()


# --- flags that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("", "expected key.path=value, as in optimizer.lr=0.1"),
        ("optimizer.lr", "expected key.path=value, as in optimizer.lr=0.1"),
        ("=3", "expected key.path=value, as in optimizer.lr=0.1"),
        (" =3", "expected key.path=value, as in optimizer.lr=0.1"),
        ("optimizer..lr=3", "expected key.path=value, as in optimizer.lr=0.1"),
        ("optimizer.=3", "expected key.path=value, as in optimizer.lr=0.1"),
        ("optimizer.lr=", "optimizer.lr: expected a number, found nothing"),
        ("optimizer.lr=fast", 'optimizer.lr: expected a number, found "fast"'),
        ("optimizer.lr=0.1=2", 'optimizer.lr: expected a number, found "0.1=2"'),
        ("optimizer.lrr=3", "optimizer.lrr: unknown key; did you mean lr?"),
        ("optimiser.lr=3", "optimiser: unknown key; did you mean optimizer?"),
        (
            "foo.bar.baz=3",
            f"foo: unknown key; expected {SECTIONS.replace(' or', ',')}, arms, reference, grid, seeds, claims or "
            "largest_learning_rate",
        ),
        ("optimizer.lr.x=3", "optimizer.lr is a value and has no field x"),
        ("model.kind.x.y=3", "model.kind is a value and has no field x"),
        ("model.hidden.0=3", "model.hidden: expected a list, found a mapping"),
        ("norm=no", f'norm.kind: expected {NORMS}, found "no"; did you mean none or noisy?'),
        ("norm.eps=1", f"norm.eps: the norm is none, which has no eps; it belongs to {NORMS_WITH_EPS}; "
         "set the kind too"),
        ("norm={kind: batch", "not YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"),
        ("optimizer.lr=!!float x", "optimizer.lr: the tag !!float is not allowed; write the plain value"),
        ("train.seed=99999999999999999999", "train.seed: a whole number of more than 64 bits"),
        ("model=cnn", "model.kind: a cnn needs images and the data are vectors; "
         "give data.shape as [channels, height, width]"),
        ("arms.a=3", "arms.a: expected a mapping, found 3"),
        ("arms.a.norm=bacth", f'arms.a.norm.kind: expected {NORMS}, found "bacth"; did you mean batch?'),
        ("train.steps={epochs:2}", "train.steps: write a space after the colon: epochs: 2"),
        ("grid.optimizer.lr=1", "grid.optimizer.lr: expected a list, found 1"),
        ("grid.optimizer.lrr=[1]", "grid.optimizer.lrr: unknown key; did you mean lr?"),
        ("reference=plain", "reference: there is no arm plain; the recipe has no arms"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_refused_by_its_text(mistakes_of: MistakesOf, flag: str, message: str) -> None:
    assert mistakes_of(BASE, flag) == (f"sets {flag}: {message}",)


def test_a_flag_with_line_ends_is_shown_on_one_line(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(BASE, "train.seed=1\nx: 2") == ("sets 'train.seed=1\\nx: 2': expected one value",)


def test_a_flag_mends_what_is_wrong_in_the_file(mistakes_of: MistakesOf) -> None:
    assert mistakes_of(optimizer("kind: sgd, lr: fast"), "optimizer.lr=0.1") == ()
    assert mistakes_of(BASE + "norm: no\n", "norm=none") == ()
