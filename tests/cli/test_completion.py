"""What a shell completes, through the protocol that its script speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bncli.measure.profile.shapes import SETS
from bncli.names import CHECKED_NORMS, KERNELS
from bncli.recipe.examples import files
from tests.cli.conftest import bncli


@pytest.fixture
def completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What bash is offered for the last of the words."""

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_BNCLI_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["bncli", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        return [line for line in bncli().out.splitlines() if line]

    return complete


def test_a_recipe_is_a_yaml_file_here_or_in_a_folder_below(completed, folder: Path) -> None:
    (folder / "a b").mkdir()
    for name in ("a b/other.yml", "a b/notes.txt", "big.yaml"):
        (folder / name).write_text("")
    assert completed("train", "") == completed("compare", "") == ["big.yaml", "small.yaml", "a b/other.yml"]
    assert completed("profile", "sm") == ["small.yaml"]
    assert completed("compare", "small.yaml", "b") == ["big.yaml"]
    assert completed("train", "a b/") == ["a b/other.yml"]
    assert completed("train", f"{folder}/s") == [f"{folder}/small.yaml"]
    assert completed("train", "nothing") == []


def test_a_run_to_continue_is_a_folder_with_a_checkpoint(completed, folder: Path) -> None:
    for name in ("runs/small/1", "runs/small/2", "runs/digits", "mine"):
        (folder / name).mkdir(parents=True)
    for name in ("runs/small/1", "runs/small/2", "mine"):
        (folder / name / "checkpoint.pt").touch()
    assert completed("train", "--resume", "") == ["mine", "runs/small/1", "runs/small/2"]
    assert completed("train", "--resume", "runs/small/") == ["runs/small/1", "runs/small/2"]
    (folder / "runs/\x1b[2J").mkdir()
    (folder / "runs/\x1b[2J/checkpoint.pt").touch()
    assert completed("train", "--resume", "ru") == ["runs/small/1", "runs/small/2"]


def test_a_name_with_control_characters_is_not_offered(completed, folder: Path) -> None:
    (folder / "other\x1b]0;x\x07.yaml").write_text("")
    (folder / "small.yaml").write_text('arms: {plain: {}, "p\\e[31m": {}, 3: {}}')
    assert completed("train", "") == ["small.yaml"]
    assert completed("train", "small.yaml", "--arm", "p") == ["plain"]


def test_an_arm_is_one_of_the_recipe_on_the_line(completed, folder: Path) -> None:
    text = (folder / "small.yaml").read_text().replace("normed:", "batch norm:")
    (folder / "spaced.yaml").write_text(text)
    assert completed("train", "small.yaml", "--arm", "") == ["plain", "normed"]
    assert completed("profile", "small.yaml", "--arm", "n") == ["normed"]
    assert completed("train", "spaced.yaml", "--set", "train.seed=3", "--arm", "b") == ["batch\\ norm"]
    assert completed("train", "spaced.yaml", "--arm", '"b') == ["batch norm"]
    for none in ("missing.yaml", "-", "empty.yaml", "binary.yaml", "text.yaml"):
        (folder / "empty.yaml").write_text("")
        (folder / "binary.yaml").write_bytes(b"\xff\x00")
        (folder / "text.yaml").write_text("arms: 3")
        assert completed("train", none, "--arm", "") == []


def test_a_flag_is_a_field_of_the_recipe_with_its_equals_sign(completed) -> None:
    assert completed("train", "small.yaml", "--set", "train.ta") == [
        "train.target=", "train.target.metric=", "train.target.value=", "train.target.also="
    ]  # fmt: skip
    fields = completed("compare", "small.yaml", "--set", "")
    assert len(fields) == len(set(fields)) > 80
    assert {"optimizer.lr=", "norm.momentum=", "model.init.std=", "seeds.tune=", "grid="} <= {*fields}


def test_names_are_completed_the_last_of_several_too(completed) -> None:
    assert completed("gradcheck", "--kernel", "") == [*KERNELS]
    assert completed("profile", "--kernel", "native,fu") == ["native,fused", "native,fused-interpreted"]
    assert completed("profile", "--shapes", "") == [*SETS]
    assert completed("profile", "--layout", "ch") == ["channels_last"]
    assert completed("profile", "--dtype", "f") == ["fp32", "fp16", "fp64"]
    assert completed("train", "--device", "c") == ["cpu", "cuda"]
    assert completed("gradcheck", "--norm", "") == [*CHECKED_NORMS]


def test_examples_are_completed_and_not_printed_into_the_list(completed) -> None:
    assert completed("train", "--example", "") == ["list", *files()]
    assert completed("train", "--example", "smoke", "--arm", "") == []


def test_completion_loads_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['bncli']\nfrom bncli.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print(*{'torch', 'pydantic', 'numpy', 'psutil'} & sys.modules.keys(), file=sys.stderr)"
    )
    for words in (["--set", ""], ["--arm", ""], ["--example", ""]):
        line = {"COMP_WORDS": "\n".join(["bncli", "train", "small.yaml", *words]), "COMP_CWORD": "4"}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "_BNCLI_COMPLETE": "complete_bash", **line},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip()
        assert ran.stderr.split() == []
