"""From a file to a checked recipe: reading, its reference, the place of each value, and back to YAML."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bncli.errors import RecipeError
from bncli.recipe.check import MOST_MISTAKES
from bncli.recipe.load import MAX_BYTES, Arm, digest, load, plain, with_values
from bncli.recipe.overrides import leaves
from bncli.recipe.sections import Recipe
from bncli.recipe.yaml import dump
from tests.recipe.conftest import BASE, Load, given_fields

# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.yaml", b"PK\x03\x04\0\0", "r.yaml: is a binary file; a recipe is a YAML file"),
        ("r.yaml", b"# caf\xe9\n", "r.yaml: is not text (byte 5 is not UTF-8); a recipe is a YAML file"),
        ("r.yaml", "a: 1".encode("utf-16"), "r.yaml: is not text (byte 0 is not UTF-8); a recipe is a YAML file"),
        (
            "r.yaml",
            b"#" * (MAX_BYTES + 1),
            "r.yaml: has 1,048,577 bytes, more than the 1,048,576 that such a file can have; "
            "a recipe is a short YAML file, or - for standard input",
        ),
        ("cifar10.yaml", b"", "r.yaml: there is no such file; did you mean cifar10.yaml?"),
        ("configuration.yml", b"", "r.yaml: there is no such file; expected configuration.yml"),
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


def test_a_mebibyte_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
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


def test_loading_imports_nothing_slow_and_a_digest_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from bncli.recipe.load import digest, load; load('recipes/digits.yaml', ['norm=batch']);"
        "slow = {'torch', 'numpy', 'scipy', 'sklearn', 'rich', 'typer'};"
        "print(digest({'b': [1, 2.5], 'a': 'x'}), *slow & sys.modules.keys())"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [digest({"b": [1, 2.5], "a": "x"})]


# --- the reference ----------------------------------------------------------------------------------------------


def test_a_recipe_without_arms_is_its_own_reference(loaded: Load) -> None:
    assert loaded(BASE).reference == "r"
    assert loaded(BASE + "arms: {a: , b: {norm: batch}}\n").reference == "a"
    assert loaded(BASE + "arms: {a: , b: {norm: batch}}\nreference: b\n").reference == "b"


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


def test_the_base_has_its_own_provenance_where_an_arm_has_its_name(loaded: Load) -> None:
    found = loaded(BASE + "arms: {r: {optimizer: {lr: 0.1}}, b: }\n")
    assert given_fields(found, Arm("r", found.base))["optimizer.lr"] == "r.yaml:3"
    assert given_fields(found, found.arms[0])["optimizer.lr"] == "r.yaml:5"


def test_provenance_names_the_file_without_its_folders(loaded: Load, tmp_path: Path) -> None:
    loaded(BASE)
    assert given_fields(load(str(tmp_path / "r.yaml")), Arm("", load("r.yaml").base))["train.steps"] == "r.yaml:4"


def test_provenance_follows_the_flags(loaded: Load) -> None:
    dropped = loaded(BASE + "norm: {kind: batch, momentum: 0.1}\n", "norm=layer", "norm=batch")
    assert given_fields(dropped, Arm("", dropped.base))["norm.kind"] == "sets norm=batch"
    assert "norm.momentum" not in given_fields(dropped, Arm("", dropped.base))
    flag = "model={kind: mlp, hidden: [5], init: he}"
    places = given_fields(loaded(BASE, flag), Arm("", loaded(BASE, flag).base))
    assert {path: place for path, place in places.items() if path.startswith("model")} == dict.fromkeys(
        ["model.kind", "model.hidden", "model.init.kind"], f"sets {flag}"
    )


def test_of_many_mistakes_the_first_are_shown_and_the_others_counted(loaded: Load) -> None:
    with pytest.raises(RecipeError) as refused:
        loaded(BASE + "".join(f"key{number}: 1\n" for number in range(300)))
    shown = refused.value.mistakes
    assert len(shown) == MOST_MISTAKES + 1
    assert shown[-1].endswith("key50: is wrong, as 249 more are")
    with pytest.raises(RecipeError) as refused:
        loaded(BASE + "key: 1\n" * 300)
    assert refused.value.mistakes[-1] == "and 249 more"


@pytest.mark.parametrize(("file", "name"), [("a.b.yaml", "a.b"), ("...yaml", "recipe"), (".yaml", "yaml")])
def test_a_recipe_is_named_after_its_file_and_never_after_the_folder_above(
    tmp_path: Path, file: str, name: str
) -> None:
    (tmp_path / file).write_text(BASE)
    assert load(str(tmp_path / file)).name == name


# --- resolved recipes ---------------------------------------------------------------------------------------------

numbers = st.floats(min_value=0, exclude_min=True, max_value=1e30)


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


# --- files beside the recipe --------------------------------------------------------------------------------------

BESIDE = """\
data: {source: npz, path: mine.npz, held_out: 3}
model: {kind: module, module: "net:make", arguments: {data: {path: mine.npz}}}
optimizer: {kind: sgd, lr: 0.1}
train: {steps: 100}
arms:
  a: {}
  b: {model: {module: "parts.deep:make"}}
  c: {model: {module: "torch.nn:Linear"}}
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a recipe with its data and modules, below the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp 1" / "parts").mkdir(parents=True)
    (tmp_path / "exp 1" / "r.yaml").write_text(BESIDE)
    for name in ("net.py", "parts/deep.py"):
        (tmp_path / "exp 1" / name).write_text("")
    np.savez(tmp_path / "exp 1" / "mine.npz", x=np.zeros((9, 4)), y=np.arange(9) % 2)
    return tmp_path / "exp 1"


def test_data_and_modules_that_are_beside_the_recipe_are_found_there(beside: Path) -> None:
    found = load("exp 1/r.yaml", allow_code=True)
    a, b, c = (plain(arm.recipe) for arm in found.arms)
    assert a["data"]["path"] == "exp 1/mine.npz"
    assert a["model"]["arguments"] == {"data": {"path": "mine.npz"}}
    modules = [each["model"]["module"] for each in (a, b, c)]
    assert modules == ["exp 1/net:make", "exp 1/parts.deep:make", "torch.nn:Linear"]
    (beside.parent / "again.yaml").write_text(dump(plain(found.base)))
    assert load("again.yaml", allow_code=True).base == found.base
    assert load(str(beside / "r.yaml"), allow_code=True).base.data.path == str(beside / "mine.npz")  # type: ignore


def test_a_recipe_without_any_section_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("{}")
    with pytest.raises(RecipeError, match="data: is missing"):
        load(str(tmp_path / "r.yaml"))


def test_the_recipes_folder_may_have_a_colon_in_its_name(beside: Path) -> None:
    beside.rename(beside.parent / "at 10:30")
    assert plain(load("at 10:30/r.yaml", allow_code=True).base)["model"]["module"] == "at 10:30/net:make"


def test_what_is_in_the_current_folder_comes_first(beside: Path) -> None:
    (beside.parent / "mine.npz").write_bytes((beside / "mine.npz").read_bytes())
    (beside.parent / "net.py").write_text("")
    found = plain(load("exp 1/r.yaml", allow_code=True).base)
    assert (found["data"]["path"], found["model"]["module"]) == ("mine.npz", "net:make")
    sets = [f"data.path={beside}/mine.npz"]
    assert plain(load("exp 1/r.yaml", sets, allow_code=True).base)["data"]["path"] == f"{beside}/mine.npz"


def test_the_folder_of_images_beside_the_recipe_is_taken_and_a_name_on_the_hub_stays(beside: Path) -> None:
    hub = "data={source: hub, name: %s, shape: [1, 8, 8], classes: 2}"
    names = [
        plain(load("exp 1/r.yaml", [hub % name], allow_code=True).base)["data"]["name"] for name in ("parts", "cifar10")
    ]
    assert names == ["exp 1/parts", "cifar10"]
