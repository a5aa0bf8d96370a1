"""The benchmark commands: each runs, small or on a made-up result, and prints what its readers look for.

The ratios that they print are held to their targets with `pytest -m slow`: ratios only, never absolute times.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import typer

from bncli import errors
from bncli.cli import app
from bncli.kernels.fused import cpu
from bncli.measure.timing.clock import Work
from bncli.recipe.sections import Recipe
from tests.benchmarks import (
    checkpoints,
    comparison,
    coverage,
    crossings,
    data_memory,
    gate,
    hazards,
    intervals,
    kernels,
    large_tensor,
    many_runs,
    ranks,
    small_calls,
    soak,
    stacked_runs,
    start_up,
    step_overhead,
    training,
)
from tests.benchmarks.hazards import Captured, Case
from tests.conftest import tiny

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
Printed = pytest.CaptureFixture[str]

# --- kernels: bncli's own commands are checked as far as their arguments, and give a made-up result -------------------

FASTER = {"value": 1.8, "interval": {"low": 1.46, "high": None}}
MEAN = {"kernel": "fused", "operation": "bn+relu", "dtype": "fp32", "layout": "contiguous", "shapes": 15}
MEAN |= {"faster": FASTER, "faster_new_memory": FASTER, "least": 1.11, "least_shape": [16, 64, 112, 112]}
STEPS = [
    {"kernel": kernel, "arm": "batch norm", "mode": mode, "samples_ms": [200.0, 242.0, 250.0], "faster": FASTER}
    for kernel in ("native", "fused")
    for mode in ("training", "evaluation")
]
RESULT: dict[str, Any] = {
    "rows": [{"error": None, "wrong": False, **row} for row in STEPS],
    "means": [MEAN],
    "ceilings": {"copies": [[2**20, 12.6]]},
}
WRONG = {"kernel": "fused", "case": "a shape", "mode": "training", "error": "wrong result", "wrong": True}


def made_up(result: dict[str, Any]) -> kernels.Run:
    def run(arguments: Sequence[str]) -> tuple[int, str]:
        if arguments[0] == "tests.benchmarks.hazards":
            return 0, "right  graph replays\n"
        _, command, *options = arguments
        parsed = typer.main.get_command(app).commands[command].make_context(command, options)  # type: ignore[attr-defined]
        assert parsed.params["device"] in ("cpu", "cuda")
        return 0, json.dumps(result) if command == "profile" else "All cases passed.\n"

    return run


@needs_compiler
def test_kernels_on_a_cpu_prints_what_the_readme_quotes(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 43.2)
    asked = ["--device", "cpu", "--quick", "--sections", "correctness,hazards,layers,step"]
    assert kernels.main(asked, made_up(RESULT)) == errors.OK
    printed = capsys.readouterr().out
    assert "All cases passed." in printed
    ratio = "1.80x [1.46, unknown]"
    mean = f"geometric mean of 15 shapes {ratio}, new memory {ratio}, worst 1.11x at 16x64x112x112\n"
    assert printed.count(f"bn+relu      contiguous     {mean}") == 2  # warm and cold
    assert "contiguous     batch 128: native 242 ms ±5%, fused 242 ms ±5%  1.80x [1.46, unknown]\n" in printed
    assert torch.__version__ in printed
    assert "WARNING    other programs use 43 % of the cores" in printed


def test_kernels_on_a_gpu_asks_for_what_the_command_line_takes(capsys: Printed) -> None:
    benchmark = kernels.Benchmark(torch.device("cuda"), quick=False, run=made_up(RESULT))
    for name in ("correctness", "hazards", "layers", "step"):
        kernels.SECTIONS[name](benchmark)
    printed = capsys.readouterr().out
    assert "right  graph replays" in printed
    assert printed.count("\nfused bn+relu      contiguous     geometric mean of 15 shapes") == 2  # beside torch.compile
    assert printed.count("\nbn+relu      contiguous     geometric mean of 15 shapes") == 2  # in fp16
    assert "channels_last  batch 256: native" in printed
    assert not benchmark.wrong


@needs_compiler
def test_kernels_fails_for_a_wrong_row_and_for_a_section_that_breaks(capsys: Printed) -> None:
    asked = ["--device", "cpu", "--sections", "layers,step"]
    assert kernels.main(asked, made_up({"rows": [WRONG], "means": []})) == errors.CHECK_FAILED
    printed = capsys.readouterr().out
    assert printed.count("WRONG  fused on a shape: wrong result") >= 2
    assert "WRONG  section layers: KeyError: 'ceilings'" in printed
    assert " ms " not in printed


def test_kernels_refuses_an_unknown_section_and_a_device_that_is_not_there(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--sections", "speed"])
    assert stopped.value.code == errors.USAGE
    if not torch.cuda.is_available():
        assert kernels.main(["--device", "cuda"]) == errors.UNAVAILABLE
    assert "expected some of correctness" in capsys.readouterr().err


@needs_compiler
def test_small_calls_are_timed_and_a_wrong_kernel_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(small_calls.measure(CPU, shapes=[(6, 5), (3, 4, 2, 2)], rounds=2))
    ways = [f"{form}, {way}" for form in ("function", "module") for way in ("forward", "forward + backward")]
    assert [what for _, what, _, _ in found] == 2 * ways
    assert all(min(us.values()) > 0 and faster.value > 0 for _, _, us, faster in found)
    monkeypatch.setattr("bncli.kernels.native.finish", lambda y, *_: y + 0.25)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        next(small_calls.measure(CPU, shapes=[(6, 5)], rounds=2))


@needs_compiler
def test_a_large_tensor_is_held_to_a_copy_of_its_size() -> None:
    found = list(large_tensor.measure((4, 8, 6, 6), channels_last=True, rounds=3))
    assert found[0][0] == "new memory"
    assert all(share > 0 for _, share, _ in found)
    samples = {"copy": (2.0, 4.0, 2.0), "both": (5.0, 20.0, 10.0)}
    assert large_tensor.share_of_copy(samples) == 0.5  # of 1, 0.5 and 0.5: five tensors beside the copy's two
    held = torch.ones(2**22)
    fresh = large_tensor.page_faults(Work(lambda _: torch.ones(2**24)))
    assert large_tensor.page_faults(Work(lambda _: held.add_(1.0))) < fresh


def test_a_tensor_beyond_the_cache_fits_into_memory(tmp_path: Path) -> None:
    for place, text in enumerate(("48K\n", "2048K\n", "30M\n")):
        (tmp_path / f"index{place}").mkdir()
        (tmp_path / f"index{place}" / "size").write_text(text)
    assert large_tensor.last_cache_bytes(tmp_path) == 30 * 2**20
    assert large_tensor.last_cache_bytes(tmp_path / "nowhere") is None
    shape = large_tensor.shape_beyond(2**25)
    assert 4 * torch.Size(shape).numel() >= 2**26 > 4 * torch.Size((shape[0] - 1, *shape[1:])).numel()
    assert 4 * torch.Size(large_tensor.shape_beyond(2**40)).numel() < 1.01 * large_tensor.MOST_BYTES


# --- hazards ----------------------------------------------------------------------------------------------------------

SMALL = Case((4, 3, 5, 7), torch.float32, channels_last=True, residual=True, kernel="native")


def captured(case: Case, device: torch.device, seed: int, frozen: str = "") -> Captured:
    """A graph without a GPU: a replay is a step, which leaves the inputs or outputs of one name as they were."""
    inputs = case.inputs(device, seed)
    outputs = case.step(inputs)

    def replay() -> None:
        kept = {name: t.detach().clone() for name, t in {**inputs, **outputs}.items() if name == frozen}
        for name, t in case.step(inputs).items():
            outputs[name].copy_(t)
        for name, t in kept.items():
            {**inputs, **outputs}[name].copy_(t)

    return Captured(replay, inputs, outputs)


@pytest.mark.parametrize("frozen", ["", "running_mean", "y", "dx", "dresidual"])
def test_graphs_are_held_to_eager_calls_and_running_statistics(frozen: str) -> None:
    wrong = hazards.graph_replays(SMALL, CPU, 4, functools.partial(captured, frozen=frozen))
    assert wrong == ([f"{frozen} in replay 0"] if frozen else [])


def test_a_compiled_step_is_held_to_the_eager_one() -> None:
    assert hazards.compiled(SMALL, CPU, backend="aot_eager") == []
    assert hazards.different({"y": torch.ones(2)}, {"y": torch.zeros(2)}) == ["y"]


@pytest.mark.cuda
def test_hazards_on_a_gpu_are_right(capsys: Printed) -> None:
    assert hazards.main(["--repeats", "20"]) == 0, capsys.readouterr().out


# --- the other commands -----------------------------------------------------------------------------------------------


def test_coverage_counts_calls_and_bytes_read_once(tmp_path: Path, capsys: Printed) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("n,c,spatial,calls\n32,1024,7x7,10\n32,64,112x112,1\n")
    coverage.main(["--shapes", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("contiguous     forward   read once 100.0% of calls, 100.0% of bytes")
    assert len(lines) == 4


def test_comparison_times_only_a_loop_with_the_steps_to_target_of_train() -> None:
    runs = [
        tiny(norm={"kind": kind}, train={"target": {"value": 0.9, "also": [0.8]}, "seed": 1})
        for kind in ("none", "batch")
    ]
    assert comparison.check_loop(runs) == "steps to all targets equal to those of bncli's train in 2 of 2 runs"
    with pytest.raises(SystemExit, match="in 2 of 3 runs: the hand-written loop does not train this recipe"):
        comparison.check_loop([*runs, tiny(train={"label_smoothing": 0.5, "seed": 1})])


def test_comparison_plans_all_runs_of_the_points_kept_and_counts_those_that_agree(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(many_runs.RECIPE + "seeds: {tune: 3, report: 4}\n")
    sets = ["grid.optimizer.lr=[0.1, 1]"]
    assert len(comparison.planned(str(file), sets, {})) == 2 * 2 * (3 + 4)
    runs = comparison.planned(str(file), sets, {"plain": [{"optimizer.lr": 1}]})
    assert len(runs) == 2 * 2 * 3 + 4 + 2 * 4
    result = {"status": "reached", "steps_run": 20, "steps_to_target": 11.5, "also": []}
    results = [result, result | {"steps_to_target": 12.5}, result | {"status": "given up", "steps_to_target": None}]
    answer = {"runs": [{"recipe_key": key, "result": each} for key, each in zip(runs, results, strict=False)]}
    words = comparison.agreement(answer, dict.fromkeys(runs, comparison.Outcome(20, (11.5,))))
    assert words.endswith("2 reached, 1 given up; steps to all targets equal to the loops' in 1 of 2 not given up")


def test_comparison_prints_what_its_ratio_is_made_of(capsys: Printed) -> None:
    hand, ours = comparison.Side(80, 80, 100_000, 4, 0), comparison.Side(20, 36, 80_000, 2, 1)
    ratio, *parts = comparison.parts(hand, ours).values()
    assert ratio == pytest.approx(math.prod(parts)) == 4
    comparison.show([(hand, ours), (hand, ours)])
    printed = capsys.readouterr().out
    assert "wall time 4.00 [4.00, 4.00]x" in printed
    assert "= run-steps 1.25 [1.25, 1.25]x" in printed
    assert "x cores in use 1.80 [1.80, 1.80]x" in printed
    assert "run-steps saved: 20,000 of 100,000, 20.0%" in printed
    assert "each run-step that was trained: 3.20 [3.20, 3.20]x" in printed
    assert "before the first run and after the last: 4.47 [4.47, 4.47]x" in printed


def test_crossings_prints_a_row_for_each_estimator(capsys: Printed) -> None:
    crossings.main(["--only", "simulated", "--runs", "2"])
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in crossings.ESTIMATORS)


def test_intervals_prints_a_row_for_each_choice(capsys: Printed) -> None:
    intervals.main(["--only", "choice", "--repeats", "1", "--seeds", "3+4"])
    printed = capsys.readouterr().out
    assert all(f"\n{choice.name}" in printed for choice in intervals.choices((3, 4), 1))


def test_intervals_prints_how_often_verdicts_on_claims_are_wrong(capsys: Printed) -> None:
    intervals.main(["--only", "claims", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert all(f"\n{kind}" in printed for kind in ("normal", "t3", "exponential"))


def test_the_gate_is_tried_on_slowed_kernels_and_on_the_same(capsys: Printed) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    given = (torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3), True, 0.1, 1e-5)
    found = [norm(x, *given) for norm in (gate.batch_norm, torch.nn.functional.batch_norm)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), x) for y in found])

    def profile(options: Sequence[str], factor: float = 1.0) -> tuple[int, str]:
        change = {"verdict": "ok" if factor == 1 else "regressed", "slower": factor}
        rows = [{"both": {"samples_ms": [1.0] * 6}}]
        return int(factor > 1), json.dumps({"rows": rows, "gate": {"changes": [change]}})

    gate.main(["--repeats", "1"], profile)
    assert capsys.readouterr().out.splitlines() == [
        "baseline: 6 to 6 rounds a row",
        *(f"{factor:g}x: exit 1, 1 regressed; slowdown {factor:.2f} to {factor:.2f}" for factor in gate.FACTORS),
        "1x: exit 0, 1 ok; slowdown 1.00 to 1.00",
    ]


def test_start_up_prints_a_row_for_each_command(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "train_and_torch_ms", lambda rounds: (900.0, 800.0))
    start_up.main(["--rounds", "0"])
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in start_up.COMMANDS)
    times = "`bncli train` begins its first step after 900 ms, `import torch` takes 800 ms: 100 ms or 12% above"
    assert printed.splitlines()[-1] == times


def test_checkpoints_prints_what_one_costs_and_both_throughputs(capsys: Printed) -> None:
    checkpoints.main(["--rounds", "1", "--steps", "20", "--every", "5"])
    printed = capsys.readouterr().out
    assert "ResNet-18  11,181,642 parameters     89.57 MB" in printed
    assert "throughput with / without, paired: " in printed


def test_step_overhead_prints_both_loops_and_their_ratio(capsys: Printed) -> None:
    step_overhead.main(["--rounds", "3", "--steps", "100"])
    first, second, ratio = capsys.readouterr().out.splitlines()
    assert first.startswith("hand-written ")
    assert second.startswith("bncli train ")
    assert ratio.startswith("ratio bncli train / hand-written, paired over 3 rounds: ")


def test_training_by_hand_has_the_losses_of_bnclis_loop(tmp_path: Path) -> None:
    arms = training.arms(training.recipe("channels_last", training.BLOCK, batch=4, side=8), tmp_path)
    assert next(arms["native"]) == pytest.approx(next(arms["eager"]), rel=1e-3)


def test_training_prints_a_row_for_each_arm_and_layout_and_refuses_other_losses(capsys: Printed) -> None:
    def arms(recipe: Recipe, folder: Path, wrong: float = 0.7) -> dict[str, training.Losses]:
        return {name: itertools.repeat(wrong if name == "fused" else 0.7) for name in training.ARMS}

    training.main(["--steps", "80"], arms)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-8:]]
    assert [row[:2] for row in rows] == [[layout, arm] for layout in kernels.LAYOUTS for arm in training.ARMS]
    assert rows[1][-6:-3] == ["1.00x", "[unknown,", "unknown]"]
    for wrong in (0.72, math.nan):
        with pytest.raises(SystemExit, match="losses after 20 steps differ"):
            training.main(["--steps", "80"], functools.partial(arms, wrong=wrong))


def test_stacked_runs_are_timed_beside_a_run_alone(capsys: Printed) -> None:
    stacked_runs.main(["--turns", "1", "--runs", "2"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["arm", "stacked", "runs", "us", "a", "run-step", "speedup"]
    assert [row.split()[-3] for row in rows] == ["none", "2"] * 2


def test_many_runs_prints_the_cost_of_each_run_and_of_a_small_comparison_beside_them(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    many_runs.main(["--runs", "120"])
    header, row = capsys.readouterr().out.splitlines()
    assert "CPU of the parent" in header
    assert row.split()[0] == "120"
    assert all(float(cell) > 0 for cell in row.split()[1:])


@pytest.mark.slow
def test_many_runs_prints_what_a_dask_cluster_costs(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    many_runs.main(["--runs", "--dask", "60"])
    assert re.search(r"^60 runs through Dask: [\d.]+ ms of the driver's CPU a run, ", capsys.readouterr().out, re.M)


def test_a_soak_tells_growth_from_none_and_leaves_out_the_first_runs() -> None:
    def sample(runs: int, mib: float) -> soak.Sample:
        return soak.Sample(runs, "parent", mib, mib, 3, 10)

    leak = [sample(runs, 90 + 0.01 * runs) for runs in range(10, 1001, 10)]
    loads = [sample(runs, 60.0 if runs < 50 else 90.0) for runs in range(10, 1001, 10)]
    assert soak.growth(leak, "rss_mib") == pytest.approx(10)
    assert soak.growth(loads, "rss_mib") == 0
    assert "parent: rss_mib 90.1 to 100 (+10 over 1,000 runs)" in soak.summary(leak, 1000, 1.0)


# --- the ratios that they print, held to their targets ----------------------------------------------------------------


@pytest.mark.slow
def test_a_step_costs_at_most_5_percent_more_than_a_hand_written_one() -> None:
    assert median(step_overhead.paired_ratios(step_overhead.measure(rounds=9, steps=1000))) <= 1.05


@pytest.mark.slow
def test_help_mistakes_and_dry_runs_start_at_once() -> None:
    ratios = start_up.cpu_ratios(rounds=5)
    assert ratios[start_up.HELP][3] <= 1.5
    for name in (start_up.HELP, start_up.COMMAND_HELP, start_up.USAGE, start_up.MISSING, start_up.DRY_RUN):
        assert ratios[name][2] <= 15


@pytest.mark.slow
def test_training_begins_soon_after_torch_is_there() -> None:
    train, torch = start_up.train_and_torch_ms(rounds=5)
    assert train <= 1.2 * torch  # the target's 150 ms beside the 0.8 s that torch takes where it was set


@pytest.mark.slow
def test_a_small_comparison_is_timed_beside_hand_written_loops(capsys: Printed) -> None:
    comparison.main(["--quick", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "equal to those of bncli's train in 4 of 4 runs" in printed
    assert re.search(r"hand-written loops / bncli compare: wall time [\d.]+ ", printed)


@pytest.mark.slow
def test_ranks_are_timed_beside_one_process(capsys: Printed) -> None:
    assert ranks.main(["--seconds", "0.4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7
    assert all(float(line.split()[-1]) > 0 for line in printed[1:])


# --- data in memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="PSS and files in memory are Linux's")
def test_workers_hold_their_data_once_and_take_batches_as_fast_as_from_their_own_memory(capsys: Printed) -> None:
    assert data_memory.main(["--gb", "0.4", "--jobs", "2"]) == 0
    words = capsys.readouterr().out
    found = re.search(r"beyond: [\d,]+ MiB, ([\d.]+) of the data", words)
    ratio = re.search(r"of 9 pairs: ([\d.]+)", words)
    assert found
    assert ratio
    assert float(found[1]) < 1.3
    assert float(ratio[1]) < 1.1
