"""`bncli train` as a user meets it: the run's folder, what is printed where, exit codes, signals and terminals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

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


OF_OWN = ("--set", "model={kind: module, module: 'mine:make'}", "--allow-code")


def own(recipe: str, act: str, *arguments: str) -> Ran:
    """Training of a model of the user's own that does something in its forward pass."""
    Path("mine.py").write_text(OWN.format(act=act))
    return bncli("train", recipe, *OF_OWN, *arguments)


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


# --- runs that go on ----------------------------------------------------------------------------------------------

# A module that acts at the call whose number is in at.txt, once.
AT = """
import os, pathlib, shutil, signal
calls, at = 0, pathlib.Path("at.txt")
def tick():
    global calls
    calls += 1
    if at.exists() and calls == int(at.read_text()):
        at.unlink()
        {act}
"""
LONG = ("--set", "train.steps=45", "--set", "train.target=null", "--set", "train.checkpoint={every: 7}", "-q", "--json")
MEASURED = {  # fields that hold times and memory, and the digest of all
    *("ms_per_step", "samples_per_s", "training_s", "evaluation_s", "checkpoint_s", "memory_mib", "environment"),
    *("peak_memory_mib", "evaluation_peak_memory_mib", "cores_lacked", "sha256"),
}


def acting(recipe: str, act: str, at: int, *arguments: str) -> Ran:
    """Training of a model of the user's own that does something at a call of its forward pass."""
    Path("at.txt").write_text(str(at))
    Path("beside.py").write_text(AT.format(act=act))
    forget_modules(Path.cwd())
    return own(recipe, "__import__('beside').tick()", *LONG, *arguments)


def left(run: str) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, list[float]]]:
    """What a run left: its metrics and its result without times, and its weights."""
    lines = [*Path(run, "metrics.jsonl").read_text().splitlines(), Path(run, "result.json").read_text()]
    *metrics, result = (
        {name: each for name, each in json.loads(line).items() if name not in MEASURED} for line in lines
    )
    weights = load_file(f"{run}/model.safetensors")
    return metrics, result, {name: each.flatten().tolist() for name, each in weights.items()}


def test_a_run_that_a_signal_stopped_anywhere_goes_on_as_if_it_had_not(recipe: str) -> None:
    acting(recipe, "pass", 0, "-o", "whole")
    stopped = 0
    # An evaluation of 60 examples is 3 calls: before the first step, in a step, and in the evaluation after step 5.
    for at, number, code in ((2, "SIGINT", 130), (6, "SIGTERM", 143), (10, "SIGHUP", 129), (70, "SIGTERM", 143)):
        ran = acting(recipe, f"os.kill(os.getpid(), signal.{number})", at, "-o", f"run {at}")
        assert (ran.code, json.loads(ran.out)["status"]) == (code, "interrupted")
        assert not Path(f"run {at}/model.safetensors").exists()
        command = ran.err.splitlines()[-1].partition("Continue it with: bncli ")[2]
        assert command == f"train --resume 'run {at}' --allow-code"
        stopped = max(stopped, json.loads(ran.out)["steps_run"])
        forget_modules(Path.cwd())
        ran = bncli(*shlex.split(command), "-q", "--json")
        assert ran.code == 0, ran.err
        assert left(f"run {at}") == left("whole")
    assert 20 < stopped < 45


def test_a_second_signal_ends_a_run_in_its_step_and_the_last_checkpoint_stays(recipe: str) -> None:
    ran = acting(recipe, "[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]", 60, "-o", "run")
    assert (ran.code, ran.out) == (143, "")
    assert ran.err.endswith("Stopped at once\nContinue it with: bncli train --resume run --allow-code\n")
    assert not Path("run/result.json").exists()


def test_an_error_that_ends_a_run_leaves_a_command_that_continues_it(recipe: str) -> None:
    ran = acting(recipe, "raise RuntimeError('no')", 60, "-o", "run")
    first, second = ran.err.splitlines()[:2]
    assert (ran.code, first) == (1, "Continue it with: bncli train --resume run --allow-code")
    assert second.startswith("bncli: model.module: mine:make raised RuntimeError")
    forget_modules(Path.cwd())
    assert bncli("train", "--resume", "run", "--allow-code", "-q").code == 0


def test_a_folder_that_is_removed_meanwhile_ends_the_run_and_stays_removed(recipe: str) -> None:
    ran = acting(recipe, "shutil.rmtree('run')", 60, "-o", "run")
    assert (ran.code, ran.out) == (1, "")
    assert "the run's folder run was removed or renamed while it was in use; what was saved before is kept" in ran.err
    assert not Path("run").exists()


def test_a_run_that_has_ended_is_shown_and_goes_on_with_more_steps(recipe: str) -> None:
    asked = ("train", recipe, "--set", "train.target=null", "-q", "--json", "-o")
    bncli(*asked, "run", "--set", "train.steps=30")
    before = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    again = bncli("train", "--resume", "run", "--json")
    assert (again.code, again.err.splitlines()[0]) == (
        0,
        "This run has ended, so nothing is trained; --set train.steps=N continues it",
    )
    assert json.loads(again.out) == json.loads(before["result.json"])
    assert {file.name: file.read_bytes() for file in Path("run").iterdir()} == before
    more = bncli("train", "--resume", "run", "--set", "train.steps=45", "--set", "train.keep=both", "-q", "--json")
    assert more.code == 0
    assert "UserWarning" not in more.err
    bncli(*asked, "whole", "--set", "train.steps=45")
    assert left("run") == left("whole")
    assert load("run/recipe.yaml").base.train.steps == 45


def test_a_run_that_reached_its_target_says_what_continues_it(recipe: str) -> None:
    asked = ("train", recipe, "-q", "--json", "-o")
    reached = json.loads(bncli(*asked, "run").out)
    shown = bncli("train", "--resume", "run", "--json")
    further = "train.stop_at_target=false"
    assert f"This run has ended, so nothing is trained; --set {further} continues it\n" in shown.err
    for name, field in (("cosine", "schedule={kind: cosine}"), ("diverged", "optimizer.lr=1e30")):
        bncli(*asked, name, "--set", field, "--set", "train.target=null")
        assert bncli("train", "--resume", name).err.startswith("This run has ended, so nothing is trained\n")
    ran = bncli("train", "--resume", "run", "--set", further, "-q", "--json")
    assert (ran.code, reached["status"], json.loads(ran.out)["status"]) == (0, "reached", "budget")
    bncli(*asked, "whole", "--set", further)
    assert left("run") == left("whole")


def test_what_a_run_cannot_go_on_with_is_refused_and_it_is_left_as_it_was(recipe: str) -> None:
    bncli("train", recipe, "-o", "run", "-q")
    before = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    for options, words in {
        ("--out", "other", "--force"): "--out, --force with --resume: a run goes on in its folder, from its checkpoint",
        ("--arm", "plain"): "--arm with --resume:",
        ("--from-weights", "x"): "--from-weights with --resume:",
        ("--set", "optimizer.lr=0.1"): "optimizer.lr was 0.5 when the run began, and is 0.1 now",
        ("--set", "train.steps=5"): "train.steps is 5, and ",
        ("--set", "train.steps=90", "--threads", "3"): "--resume: threads was 1",
    }.items():
        refused = bncli("train", "--resume", "run", *options)
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.err
        assert "Continue it with" not in refused.err
    assert {file.name: file.read_bytes() for file in Path("run").iterdir()} == before
    Path("run/checkpoint.pt").unlink()
    assert "--resume run: has no checkpoint.pt to continue from" in bncli("train", "--resume", "run").err
    assert "--resume none: is not the folder of a run" in bncli("train", "--resume", "none").err
    assert "RECIPE is missing; see bncli train --help" in bncli("train", "--quiet").err


# --- trained models -----------------------------------------------------------------------------------------------


def test_a_trained_model_is_evaluated_as_its_run_did(recipe: str) -> None:
    asked = ("train", recipe, "--arm", "normed", "--set", "train.keep=both", "-q", "--json", "-o", "run")
    last = json.loads(bncli(*asked).out)["evaluations"][-1]
    found = bncli("train", "run", "--evaluate", "--json")
    assert json.loads(found.out) == {**last, "train_loss": None}
    assert bncli("train", "run/model.safetensors", "--evaluate", "--json").out == found.out
    assert bncli("train", "run/model-best.safetensors", "--evaluate").words.startswith(
        "run/model-best.safetensors steps trained "
    )
    for model, words in {
        "none": "none: cannot be read: No such file or directory",
        "small.yaml": "small.yaml: is damaged, or no safetensors file",
    }.items():
        refused = bncli("train", model, "--evaluate")
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.err
    refused = bncli("train", "run", "--evaluate", "--set", "train.seed=3", "--plot", "x.svg")
    assert "--set, --plot with --evaluate: nothing is trained, and the model's recipe is in its file" in refused.err


def test_a_run_that_starts_from_a_file_of_weights_says_so_also_when_it_goes_on(recipe: str) -> None:
    bncli("train", recipe, "-o", "first", "-q")
    asked = ("--set", "train.target=null", "--set", "train.steps=20", "-q", "--json")
    begun = json.loads(bncli("train", recipe, *asked, "-o", "run", "--from-weights", "first/model.safetensors").out)
    assert begun["initial_weights"].startswith("first/model.safetensors sha256 ")
    assert (
        begun["evaluations"][0]["loss"] == json.loads(Path("first/result.json").read_text())["evaluations"][-1]["loss"]
    )
    Path("first/model.safetensors").rename("a\n\x1b\udcff.safetensors")
    odd = ("--from-weights", "a\n\x1b\udcff.safetensors", "-o", "odd")
    assert bncli("train", recipe, *asked, *odd).code == bncli("train", "--resume", "odd", "-q").code == 0
    Path("a\n\x1b\udcff.safetensors").unlink()
    ran = bncli("train", "--resume", "run", "--set", "train.steps=30")
    assert f"initial weights {begun['initial_weights'][:20]}" in ran.words
    assert "saved model.safetensors, checkpoint.pt" in ran.words
    assert json.loads(Path("run/result.json").read_text())["initial_weights"] == begun["initial_weights"]
    refused = bncli(
        "train", recipe, "--set", "model.hidden=[8]", "--from-weights", "run/model.safetensors", "-o", "other"
    )
    assert refused.code == 2
    assert "--from-weights: " in refused.err
    assert not Path("other").exists()


def test_a_runs_folder_in_the_place_of_a_recipe_is_answered_with_the_recipe_in_it(recipe: str) -> None:
    bncli("train", recipe, "-o", "run", "-q")
    assert (
        "run is a folder; a run's goes on with --resume run, and --evaluate evaluates it" in bncli("train", "run").err
    )
    assert "run: is a folder; name the recipe in it, run/recipe.yaml" in bncli("compare", "run").err
    Path("run/recipe.yaml").unlink()
    Path("run/recipe.yaml").symlink_to("../small.yaml")
    assert "run is a folder without a recipe.yaml as bncli writes one" in bncli("profile", "run").err


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


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_terminal_that_is_closed_stops_the_run_which_is_saved(recipe: str) -> None:
    ours, theirs = os.openpty()
    long = ("--set", "train.steps=1000000", "--set", "train.target=null")
    started = process("train", recipe, *long, "-o", "run", stdin=theirs, stdout=theirs, stderr=theirs, process_group=0)
    os.close(theirs)
    while b"accuracy" not in os.read(ours, 65536):  # the bar of a run that goes on
        pass
    os.close(ours)
    started.send_signal(signal.SIGHUP)
    assert started.wait() == 129
    assert json.loads(Path("run/result.json").read_text())["status"] == "interrupted"
    assert Path("run/checkpoint.pt").exists()


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
        {"recipe.yaml", "metrics.jsonl", "result.json", "checkpoint.pt", "model.safetensors", "tensorboard"},
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
