"""`bncli train` as a user meets it: the run's folder, what is printed where, exit codes, signals and terminals."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bncli.kernels import fused
from bncli.names import RECIPE_KERNELS
from bncli.recipe.load import load
from bncli.report.files import from_json
from bncli.results.train import RunResult
from tests.cli.conftest import RECIPE, Ran, bncli, forget_modules, process
from tests.conftest import OWN

ROOT = Path(__file__).parents[2]


def test_train_ends_with_a_table_on_stdout_and_messages_on_stderr(recipe: str) -> None:
    ran = bncli("train", recipe)
    assert ran.code == 0
    for word in ("steps to target", "samples/s", "ms/step", "memory", "accuracy"):
        assert word in ran.out.lower()
    assert "Saved in runs/small/" in ran.err
    assert "\x1b" not in ran.out + ran.err


def test_a_run_folder_holds_the_resolved_recipe_the_metrics_and_the_result(recipe: str) -> None:
    ran = bncli("train", recipe, "--out", "run", "--set", "optimizer.lr=0.3", "--json", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    result = from_json(RunResult, ran.out)
    assert json.loads(Path("run/result.json").read_text()) == json.loads(ran.out)
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "evaluated" for event in events) == len(result.evaluations)
    assert load("run/recipe.yaml").base.optimizer.lr == 0.3
    again = bncli("train", "run/recipe.yaml", "--out", "again", "--json", "-q")
    assert again.code == 0
    assert from_json(RunResult, again.out).evaluations == result.evaluations


def test_a_folder_with_a_run_is_not_written_over_unless_forced(recipe: str) -> None:
    asked = ("train", recipe, "-o", "run", "-q")
    assert bncli(*asked).code == 0
    refused = bncli(*asked)
    assert refused.code == 2
    assert "--out run: already contains a run; choose another folder, or overwrite it with --force" in refused.err
    assert bncli(*asked, "--force").code == 0


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("out", ["mine", "."])
def test_the_users_own_recipe_is_never_written_over(recipe: str, out: str, force: tuple[str, ...]) -> None:
    own = Path(out, "recipe.yaml")
    own.parent.mkdir(exist_ok=True)
    own.write_text("# my notes\n" + RECIPE)
    refused = bncli("train", str(own), "-o", out, "-q", *force)
    assert refused.code == 2
    assert f"--out {out}: {own} was not written by bncli" in refused.err
    assert own.read_text() == "# my notes\n" + RECIPE
    assert sorted(file.name for file in own.parent.iterdir() if file.name != recipe) == ["recipe.yaml"]


def test_train_takes_an_arm_by_name(recipe: str) -> None:
    assert bncli("train", recipe, "--arm", "normed", "-o", "run").code == 0
    assert load("run/recipe.yaml").base.norm.kind == "batch"
    refused = bncli("train", recipe, "--arm", "normd")
    assert refused.code == 2
    assert "--arm normd: did you mean normed?" in refused.err


def test_a_run_that_diverges_leaves_with_4_and_keeps_its_result(recipe: str) -> None:
    ran = bncli("train", recipe, "--set", "optimizer.lr=1e30", "-o", "run")
    assert ran.code == 4
    assert "diverged" in ran.out
    assert json.loads(Path("run/result.json").read_text())["status"] == "diverged"


def test_a_missed_target_is_an_error_only_when_it_is_required(recipe: str) -> None:
    missed = ("train", recipe, "--set", "train.steps=5")
    ran = bncli(*missed)
    assert ran.code == 0
    assert "> 3.85, the most that" in ran.out
    assert bncli(*missed, "--require-target").code == 1


def test_the_fused_kernel_trains_on_the_cpu_as_the_native_one_does(recipe: str) -> None:
    asked = ("train", recipe, "--device", "cpu", "--json", "-q", "--set")
    native, ours = (
        from_json(RunResult, bncli(*asked, f"norm={{kind: batch, kernel: {kernel}}}", "-o", kernel).out).evaluations
        for kernel in RECIPE_KERNELS
    )
    # Float32 sums in another order, over some tens of steps.
    assert [each.loss for each in ours] == pytest.approx([each.loss for each in native], rel=1e-4)


def test_a_kernel_that_cannot_run_is_refused_and_not_replaced(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: f"there is no compiler for {device}")
    ran = bncli("train", recipe, "--set", "norm={kind: batch, kernel: fused}", "--device", "cpu")
    assert (ran.code, ran.out) == (3, "")
    reason = "the fused kernel cannot run: there is no compiler for cpu. No other kernel replaces it"
    assert f"bncli: {reason}" in ran.err
    assert not Path("runs").exists()


def test_a_run_that_gives_up_before_its_first_step_leaves_no_folder(recipe: str) -> None:
    assert bncli("train", recipe, "--set", "data={source: npz, path: none.npz}").code == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize("wrong", [("--plot", "run.eps"), ("--no-caption",)])
def test_what_could_not_be_drawn_is_refused_in_a_dry_run_too(recipe: str, wrong: tuple[str, ...]) -> None:
    ran = bncli("train", recipe, "--dry-run", *wrong)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1


def test_a_dry_run_of_train_gives_the_parameters_that_the_run_has(recipe: str) -> None:
    asked = ("train", recipe, "--arm", "normed", "--json")
    planned = json.loads(bncli(*asked, "--dry-run").out)
    assert planned["arms"][0]["parameters"] == json.loads(bncli(*asked, "-q").out)["parameters"]
    assert 0 < planned["arms"][0]["memory_mib"] < planned["memory"]["available_mib"]


# --- recipes that bncli comes with ----------------------------------------------------------------------------------


def test_an_example_is_printed_and_trains_from_standard_output(folder: Path) -> None:
    printed = bncli("train", "--example", "smoke")
    assert (printed.code, printed.err) == (0, "")
    (folder / "mine.yaml").write_text(printed.out)
    assert load("mine.yaml").base == load(str(ROOT / "recipes" / "smoke.yaml")).base
    assert bncli("train", "mine.yaml", "--dry-run").code == 0


def test_the_examples_are_listed_with_what_they_are_for(folder: Path) -> None:
    lines = bncli("train", "--example", "list").out.splitlines()
    assert "smoke                 see in a few seconds that an installation trains" in lines
    assert any(line.startswith("own/npz  ") for line in lines)


def test_an_example_that_is_none_is_refused_with_the_nearest(folder: Path) -> None:
    refused = bncli("train", "--example", "digit")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "bncli: --example digit: did you mean digits?\n"


@pytest.mark.parametrize("here", ["clone", "elsewhere"])
@pytest.mark.parametrize(("name", "arm"), [("npz", "plain"), ("npz", "batch norm"), ("images", "batch norm")])
def test_the_recipes_of_an_own_model_train_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, here: str, name: str, arm: str
) -> None:
    if name == "images":
        pytest.importorskip("datasets")
    recipe = ROOT / "recipes" / "own" / f"{name}.yaml"
    if here == "clone":
        monkeypatch.chdir(ROOT)
        recipe = recipe.relative_to(ROOT)
    forget_modules(ROOT / "recipes")
    asked = ("train", str(recipe), "--arm", arm, "--set", "train.steps=20", "-o", str(folder / "run"), "--json")
    assert "your own code" in bncli(*asked).err
    ran = bncli(*asked, "--allow-code", "-q")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["steps_run"] == 20
    forget_modules(ROOT / "recipes")


# --- models of the user's own, and signals ------------------------------------------------------------------------


def own(recipe: str, act: str, *arguments: str) -> Ran:
    """Training of a model of the user's own that does something in its forward pass."""
    Path("mine.py").write_text(OWN.format(act=act))
    return bncli("train", recipe, "--set", "model={kind: module, module: 'mine:make'}", "--allow-code", *arguments)


@pytest.mark.parametrize("act", ["import sys; sys.exit(0)", "raise RuntimeError('no')"])
def test_an_own_model_that_ends_the_run_is_named_with_its_line(recipe: str, act: str) -> None:
    ran = own(recipe, act)
    assert (ran.code, ran.out) == (1, "")
    assert "model.module: mine:make raised" in ran.err
    assert "mine.py:5" in ran.err


def test_what_an_own_model_prints_stays_out_of_the_result(recipe: str) -> None:
    ran = own(recipe, "print('hello')", "--json", "--quiet")
    assert ran.code == 0
    assert json.loads(ran.out)["steps_run"] > 0
    assert "hello" in ran.err


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_ends_a_run_after_its_step_and_keeps_what_is_computed(recipe: str, number: str, code: int) -> None:
    count = "self.calls = getattr(self, 'calls', 0) + 1"
    act = f"import os, signal; {count}; self.calls == 30 and os.kill(os.getpid(), signal.{number})"
    many = ("--set", "train.steps=10000", "--set", "train.target=null", "--set", "train.evaluate_every=10")
    ran = own(recipe, act, "-o", "run", *many)
    assert ran.code == code
    assert "interrupted" in ran.out
    result = json.loads(Path("run/result.json").read_text())
    assert result["status"] == "interrupted"
    assert 1 <= result["steps_run"] <= 30


# --- terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_the_bar_on_a_terminal_leaves_stdout_to_the_result(recipe: str) -> None:
    """rich's Progress takes stdout over when stderr is a terminal (rich issue 2151); no pipe shows that."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    started = process("train", recipe, "--json", stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        screen += read
    os.close(ours)
    out, _ = started.communicate()
    assert json.loads(out)["status"] == "reached"
    assert b"\x1b[" in screen  # a bar was drawn
    assert b"steps_to_target" not in screen


def test_no_bar_and_no_colour_off_a_terminal_whatever_is_forced(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    ran = bncli("train", recipe)
    assert "\r" not in ran.out + ran.err
    assert "\x1b[3" not in ran.out + ran.err
    assert "━" not in ran.err


def test_a_plot_shows_the_run_and_beside_it_what_the_probes_measured(recipe: str) -> None:
    pytest.importorskip("matplotlib")
    ran = bncli("train", recipe, "-o", "run", "--plot", "run.svg", "--set", "probes={measure: gradients, at: 5}")
    assert ran.code == 0
    assert "Plot written to run.svg\nPlot written to run-layers.svg\n" in ran.err
    assert "<!-- held out -->" in Path("run.svg").read_text()
    assert "<!-- norm of the weight gradient -->" in Path("run-layers.svg").read_text()


def test_a_plot_that_cannot_be_written_is_refused_before_training(recipe: str) -> None:
    ran = bncli("train", recipe, "-o", "run", "--plot", "nowhere/run.svg")
    assert (ran.code, ran.out) == (2, "")
    assert "nowhere/run.svg: its folder nowhere does not exist" in ran.err
    assert not Path("run").exists()


def test_tensorboards_files_are_in_the_runs_folder_beside_the_record(recipe: str) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ran = bncli(
        "train", recipe, "-o", "run", "--tensorboard", "--set", "probes={measure: inputs, at: 20}", "-q", "--json"
    )
    assert ran.code == 0
    assert (ran.err, {file.name for file in Path("run").iterdir()}) == (
        "",
        {"recipe.yaml", "metrics.jsonl", "result.json", "tensorboard"},
    )
    found = event_accumulator.EventAccumulator("run/tensorboard")
    found.Reload()
    result = from_json(RunResult, ran.out)
    accuracies = [(each.step, pytest.approx(each.value)) for each in found.Scalars("held out/accuracy")]
    assert accuracies == [(each.step, each.accuracy) for each in result.evaluations]
    assert found.Tags()["histograms"] == ["inputs/hidden1.activation"]


def test_a_run_needs_neither_matplotlib_nor_tensorboard(recipe: str, monkeypatch) -> None:
    for name in ("matplotlib", "tensorboard", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bncli("train", recipe, "-o", "run", "-q").code == 0


def test_tensorboard_is_refused_before_training_where_it_is_missing(recipe: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    ran = bncli("train", recipe, "-o", "run", "--tensorboard")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "bncli: TensorBoard is not installed; install it with: pip install tensorboard\n"
    assert not Path("run").exists()
