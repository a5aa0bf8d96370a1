"""From a file to a checked recipe: reading, overrides, arms on top of the base, provenance, and back to YAML."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bncli.errors import RecipeError
from bncli.recipe.load import MAX_BYTES, Arm, Loaded, digest, leaves, load, plain, with_values
from bncli.recipe.sections import Recipe
from bncli.recipe.yaml import dump

BASE = """\
data: {source: synthetic}
model: {kind: mlp}
optimizer: {kind: sgd, lr: 0.1}
train: {steps: 100}
"""
OWN = BASE.replace("{kind: mlp}", "{kind: module, module: a:b, arguments: {width: 3, depth: 2}}")

Load = Callable[..., Loaded]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as the file r.yaml."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, *sets: str, allow_code: bool = False) -> Loaded:
        Path("r.yaml").write_text(text)
        return load("r.yaml", sets, allow_code)

    return write_and_load


def arm(loaded: Loaded, name: str) -> Recipe:
    return next(arm.recipe for arm in loaded.arms if arm.name == name)


def given_fields(loaded: Loaded, arm: Arm) -> dict[str, str]:
    return {path: place for path, _, place in loaded.provenance(arm) if place != "default"}


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.yaml", b"PK\x03\x04\0\0", "r.yaml: is a binary file; a recipe is a YAML file"),
        ("r.yaml", b"# caf\xe9\n", "r.yaml: is not text (byte 5 is not UTF-8); a recipe is a YAML file"),
        ("r.yaml", "a: 1".encode("utf-16"), "r.yaml: is not text (byte 0 is not UTF-8); a recipe is a YAML file"),
        ("r.yaml", b"#" * (MAX_BYTES + 1), "r.yaml: is larger than 1 MiB; a recipe is a short YAML file"),
        ("dirty.yaml", b"", "r.yaml: there is no such file; expected dirty.yaml"),
        ("rr.yaml", b"", "r.yaml: there is no such file; did you mean rr.yaml?"),
        ("r.yml", b"", "r.yaml: there is no such file; did you mean r.yml?"),
        ("notes.txt", b"", "r.yaml: there is no such file"),
        ("r.yaml/notes.txt", b"", "r.yaml: is a folder; name a recipe file in it"),
    ],
)
def test_a_file_that_cannot_be_read_as_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        load("r.yaml")
    assert refused.value.mistakes == (message,)
    assert refused.value.exit_code == 2


def test_a_file_in_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere/r\.yaml: there is no such file$"):
        load(str(tmp_path / "nowhere" / "r.yaml"))
    (tmp_path / "r.yaml").write_text(BASE)
    with pytest.raises(RecipeError, match=r"r\.yaml/x\.yaml: cannot be read: Not a directory$"):
        load(str(tmp_path / "r.yaml" / "x.yaml"))


def test_a_file_of_exactly_one_mebibyte_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()
    (tmp_path / "r.yaml").write_bytes(text + b"#" * (MAX_BYTES - len(text)))
    assert load(str(tmp_path / "r.yaml")).base.train.steps == 100


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BytesIO(BASE.replace("lr: 0.1", "lr: -1").encode())

    monkeypatch.setattr(sys, "stdin", Input)
    with pytest.raises(RecipeError) as refused:
        load("-")
    assert refused.value.mistakes == ("standard input:3: optimizer.lr: expected a number above 0, found -1",)


def test_loading_a_recipe_imports_no_torch_and_nothing_else_that_is_slow() -> None:
    code = (
        "import sys; from bncli.recipe.load import load; load('recipes/digits.yaml', ['norm=batch']);"
        "print([name for name in ('torch', 'numpy', 'scipy', 'sklearn', 'rich', 'typer') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- shorthands and defaults --------------------------------------------------------------------------------------


def test_a_bare_name_stands_for_a_section_of_that_kind(loaded: Load) -> None:
    text = BASE.replace("{source: synthetic}", "digits").replace("{kind: mlp}", "{kind: mlp, init: xavier}")
    recipe = loaded(text + "norm: layer\n").base
    assert (recipe.data.source, recipe.norm.kind, recipe.model.kind) == ("digits", "layer", "mlp")
    assert plain(recipe)["model"]["init"] == {"kind": "xavier", "std": None}


def test_an_argument_of_an_own_model_is_no_section_whatever_its_name(loaded: Load) -> None:
    recipe = loaded(OWN.replace("width: 3", "norm: batch"), "model.arguments.init=he", allow_code=True).base
    assert plain(recipe)["model"]["arguments"] == {"norm": "batch", "depth": 2, "init": "he"}


def test_a_section_with_a_default_kind_may_leave_it_out(loaded: Load) -> None:
    assert plain(loaded(BASE + "schedule: {warmup: 9}\n").base)["schedule"] == {"kind": "constant", "warmup": 9}
    assert loaded(BASE, "schedule.warmup=9").base == loaded(BASE + "schedule: {warmup: 9}\n").base


def test_a_recipe_without_arms_is_its_own_reference(loaded: Load) -> None:
    assert loaded(BASE).reference == "r"
    assert loaded(BASE + "arms: {a: , b: {norm: batch}}\n").reference == "a"
    assert loaded(BASE + "arms: {a: , b: {norm: batch}}\nreference: b\n").reference == "b"


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


def test_an_arm_that_changes_the_initial_weights_drops_the_deviation_of_the_gaussian_ones(loaded: Load) -> None:
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


# --- overrides ----------------------------------------------------------------------------------------------------


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


def test_a_flag_can_change_add_and_empty_an_arm(loaded: Load) -> None:
    text = BASE + "arms: {a: {norm: {kind: group, groups: 2}}, b: {norm: batch}}\n"
    found = loaded(text, "arms.a.norm=layer", "arms.b.norm.eps=1e-3", "arms.c.train.batch_size=9", "arms.d=")
    norms = [plain(arm.recipe)["norm"] for arm in found.arms]
    assert [arm.name for arm in found.arms] == ["a", "b", "c", "d"]
    assert norms[0] == {"kind": "layer", "eps": 1e-5, "affine": True}
    assert norms[1]["eps"] == 1e-3
    assert arm(found, "c").train.batch_size == 9
    assert arm(found, "d") == found.base


def test_a_flag_can_set_the_grid_the_seeds_and_the_reference(loaded: Load) -> None:
    text = BASE + "arms: {batch norm: {norm: batch}, plain: }\ngrid: {train.batch_size: [10, 20]}\n"
    file = loaded(text, "grid.optimizer.lr=[1, 2]", "seeds.tune=7", "reference=batch norm").file
    assert file.grid == {"train.batch_size": (10, 20), "optimizer.lr": (1, 2)}
    assert (file.seeds.tune, file.seeds.report, file.reference) == (7, 10, "batch norm")


def test_a_flag_that_gives_all_arms_or_the_whole_grid_replaces_those_of_the_file(loaded: Load) -> None:
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


# --- provenance ---------------------------------------------------------------------------------------------------

WITH_ARMS = """\
data: digits
model:
  kind: mlp
  hidden:
    - 20
    - 20
  init: {kind: gaussian, std: 0.1}
norm: {kind: batch, momentum: 0.2}
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 100}
arms:
  same:
  other:
    norm: layer
    model: {init: he}
    optimizer:
      kind: adam
      lr: 0.1
"""


def test_every_field_says_whether_it_comes_from_a_line_a_flag_or_a_default(loaded: Load) -> None:
    found = loaded(WITH_ARMS, "train.seed=4", "norm.eps=1e-3", "arms.other.train.batch_size=9")
    base = {
        "data.source": "r.yaml:1",
        "model.kind": "r.yaml:3",
        "model.hidden": "r.yaml:4",
        "model.init.kind": "r.yaml:7",
        "model.init.std": "r.yaml:7",
        "norm.kind": "r.yaml:8",
        "norm.momentum": "r.yaml:8",
        "norm.eps": "sets norm.eps=1e-3",
        "optimizer.kind": "r.yaml:9",
        "optimizer.lr": "r.yaml:9",
        "optimizer.momentum": "r.yaml:9",
        "train.steps": "r.yaml:10",
        "train.seed": "sets train.seed=4",
    }
    assert given_fields(found, Arm("", found.base)) == base
    assert given_fields(found, found.arms[0]) == base
    dropped = {"model.init.std", "norm.momentum", "optimizer.momentum"}
    assert given_fields(found, found.arms[1]) == {path: base[path] for path in base.keys() - dropped} | {
        "norm.kind": "r.yaml:14",
        "model.init.kind": "r.yaml:15",
        "optimizer.kind": "r.yaml:17",
        "optimizer.lr": "r.yaml:18",
        "train.batch_size": "sets arms.other.train.batch_size=9",
    }


def test_every_field_of_a_run_has_a_provenance_and_its_value(loaded: Load) -> None:
    found = loaded(WITH_ARMS)
    for each in found.arms:
        expected = [(".".join(map(str, keys)), value) for keys, value in leaves(plain(each.recipe))]
        assert [(path, value) for path, value, _ in found.provenance(each)] == expected


def test_the_base_has_its_own_provenance_where_an_arm_has_the_name_it_is_run_under(loaded: Load) -> None:
    found = loaded(BASE + "arms: {r: {optimizer: {lr: 0.1}}, b: }\n")
    assert given_fields(found, Arm("r", found.base))["optimizer.lr"] == "r.yaml:3"
    assert given_fields(found, found.arms[0])["optimizer.lr"] == "r.yaml:5"


def test_a_value_that_a_flag_has_dropped_leaves_no_provenance_behind(loaded: Load) -> None:
    found = loaded(BASE + "norm: {kind: batch, momentum: 0.1}\n", "norm=layer", "norm=batch")
    assert given_fields(found, Arm("", found.base))["norm.kind"] == "sets norm=batch"
    assert "norm.momentum" not in given_fields(found, Arm("", found.base))


def test_every_field_of_a_section_that_a_flag_gives_whole_comes_from_the_flag(loaded: Load) -> None:
    flag = "model={kind: mlp, hidden: [5], init: he}"
    places = given_fields(loaded(BASE, flag), Arm("", loaded(BASE, flag).base))
    assert {path: place for path, place in places.items() if path.startswith("model")} == dict.fromkeys(
        ["model.kind", "model.hidden", "model.init.kind"], f"sets {flag}"
    )


# --- resolved recipes ---------------------------------------------------------------------------------------------

numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=numbers,
    eps=numbers,
    seed=st.integers(0, 2**63 - 1),
    path=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["no", "012", "1e3", "null", ""]),
)
def test_a_resolved_recipe_reads_back_as_the_same_recipe_with_the_same_digest(
    loaded: Load, lr: float, eps: float, seed: int, path: str
) -> None:
    recipe = Recipe.model_validate(
        {
            "data": {"source": "npz", "path": path},
            "model": {"kind": "cnn", "channels": [3, 4], "init": {"kind": "gaussian", "std": eps}},
            "norm": {"kind": "batch", "eps": eps, "momentum": None},
            "optimizer": {"kind": "adamw", "lr": lr, "betas": [0.5, 0.25]},
            "train": {"steps": 3, "evaluate_every": 1, "seed": seed, "target": {"metric": "loss", "value": lr}},
        }
    )
    again = loaded(dump(plain(recipe))).base
    assert again == recipe
    assert digest(plain(again)) == digest(plain(recipe))


def test_a_digest_depends_on_the_data_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert len({digest(data) for data in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"})}) == 5


def test_a_digest_is_the_same_in_every_process() -> None:
    code = "from bncli.recipe.load import digest; print(digest({'b': [1, 2.5], 'a': 'x'}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == digest({"b": [1, 2.5], "a": "x"})


def test_plain_data_is_json_with_the_kind_of_each_section_first(loaded: Load) -> None:
    data = plain(loaded(WITH_ARMS).base)
    assert json.loads(json.dumps(data)) == data
    assert [next(iter(data[name])) for name in ("data", "model", "norm", "optimizer", "schedule")] == [
        "source", "kind", "kind", "kind", "kind"
    ]  # fmt: skip


def test_values_are_put_into_a_recipe_and_checked(loaded: Load) -> None:
    base = loaded(BASE).base
    changed = with_values(base, {"optimizer.lr": 3, "train.seed": 5, "model.hidden": [4]})
    assert plain(changed) == plain(loaded(BASE, "optimizer.lr=3", "train.seed=5", "model.hidden=[4]").base)
    with pytest.raises(KeyError, match=r"optimizer\.lrr"):
        with_values(base, {"optimizer.lrr": 3})
    with pytest.raises(ValidationError, match="greater than 0"):
        with_values(base, {"optimizer.lr": -3})
