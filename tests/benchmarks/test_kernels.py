"""The kernel benchmark's sections for a GPU, dry on a CPU: the flow, what is not timed, and the verdicts."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli import errors
from bncli.kernels import native
from bncli.measure.reference import case as cases
from bncli.measure.reference.judge import Evidence, Large, judged, large
from bncli.results.finding import Finding
from bncli.results.profile import Case
from tests.benchmarks import (
    kernels,
    kernels_check,
    kernels_hazards,
    kernels_resnet,
    kernels_sections,
    kernels_speed,
    kernels_sweep,
)
from tests.benchmarks.kernels_check import Check
from tests.benchmarks.kernels_pool import Pool, Task
from tests.benchmarks.kernels_report import Report
from tests.benchmarks.kernels_speed import Target, Timed

CPU = torch.device("cpu")
DRY = ["--device", "cpu", "--candidate", "seam"]  # the GPU's sections, with native behind the seam


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the flow -----------------------------------------------------------------------------------------------------


def test_every_section_runs_on_a_cpu_and_keeps_its_raw_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shapes.csv").write_text("n,c,spatial,calls,networks\n4,8,3x3,10,1\n2,5,,3,1\n")
    files = ["--shapes", str(tmp_path / "shapes.csv"), "--json", str(tmp_path / "all.json")]
    assert kernels.main([*DRY, "--quick", *files]) == errors.OK
    printed = capsys.readouterr().out
    assert "0 wrong" in printed
    assert "of 13 calls timed (100% of all)" in printed
    found = json.loads((tmp_path / "all.json").read_text())
    assert {record["kind"] for record in found["records"]} == {"copy", "launch", "times", "resnet"}
    times = [record["samples_ms"] for record in found["records"] if record["kind"] == "times"]
    assert all(len(samples) >= 3 and min(samples) > 0 for arms in times for samples in arms.values())
    assert found["environment"]["torch"] == torch.__version__


def test_no_speed_is_printed_for_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kernels_check.CANDIDATES, "seam", statistics_as_constants)
    given = [*DRY, "--quick", "--sections", "correctness,layers,small,resnet"]
    assert kernels.main(given) == errors.CHECK_FAILED
    printed = capsys.readouterr().out
    assert "WRONG, so not timed" in printed
    assert "ResNet-50: its gradients are wrong" in printed
    assert " ms [" not in printed
    assert " us a step" not in printed


def test_no_speed_is_printed_for_an_interpreted_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "candidate_of", lambda *_: kernels.Candidate("seam", interpreted=True))
    assert kernels.main(["--device", "cpu", "--quick"]) == errors.OK
    printed = capsys.readouterr().out
    assert "not run: layers: the candidate runs in Triton's interpreter" in printed
    assert " ms [" not in printed


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--sections", "speed"], errors.USAGE, "expected some of correctness"),
        (["--sections", "sweep"], errors.USAGE, "--shapes FILE"),
        (["--shapes", "missing.csv"], errors.USAGE, "there is no such file"),
        (["--device", "tpu"], errors.USAGE, "expected one of"),
    ],
)
def test_a_wrong_option_ends_the_run_before_it_begins(
    given: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main([*DRY, *given]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out


def test_a_kernel_that_cannot_run_here_ends_the_run_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, device: torch.device) -> None:
        raise errors.Unavailable(f"the {name} kernel cannot run: there is no C compiler")

    monkeypatch.setattr(kernels.kernels, "get", refuse)
    assert kernels.main(["--device", "cpu"]) == errors.UNAVAILABLE
    captured = capsys.readouterr()
    assert "fused kernel cannot run: there is no C compiler" in captured.err
    assert not captured.out


def test_a_section_that_breaks_fails_the_run_and_the_next_ones_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_sections, "copy", lambda *_: 1 / 0)
    assert kernels.main([*DRY, "--quick", "--sections", "copy,small"]) == errors.CHECK_FAILED
    printed = capsys.readouterr().out
    assert "section copy" in printed
    assert " us a step" in printed


def test_a_run_that_hangs_is_ended_and_says_where_it_stood(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    kernels.end_if_late(0.05, codes.append).join()
    assert codes == [errors.CHECK_FAILED]
    said = capfd.readouterr().err
    assert "ABORTED: not through after 0 s" in said
    assert "test_a_run_that_hangs_is_ended" in said


def test_a_run_that_ends_in_time_is_left_alone() -> None:
    codes: list[int] = []
    watch = kernels.end_if_late(0.05, codes.append)
    watch.cancel()
    watch.join()
    assert not codes


# --- what is right and what is wrong ------------------------------------------------------------------------------


def in_float32(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    *,
    constant: bool = False,
    half_sums: bool = False,
    of_squares: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in an order of its own, in float32 or wider, rounded once at the end; or wrong in a named way."""
    dims, channels = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    summed = x if half_sums else wide
    mean, var = statistics or (summed.mean(dims).to(wide), None)
    mean = mean.to(wide)
    if var is None:
        var = (wide * wide).mean(dims) - mean * mean if of_squares else (wide - mean.view(channels)).square().mean(dims)
    if constant:
        mean, var = mean.detach(), var.detach()
    z = (wide - mean.view(channels)) * (var.to(wide) + eps).pow(-0.5).view(channels)
    if weight is not None and bias is not None:
        z = z * weight.to(wide).view(channels) + bias.to(wide).view(channels)
    z = native.finish(z, None if residual is None else residual.to(wide), activation)
    y = torch.empty_like(x).copy_(z) if not z.requires_grad else z.to(x.dtype)
    return y, mean.detach(), var.detach()


def statistics_as_constants(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return in_float32(*given, constant=True)


def sums_in_half_precision(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return in_float32(*given, half_sums=True)


def mean_of_squares(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Wrong where the mean is large beside the deviation."""
    x, *others = given
    shifted = x + 3000.0 * (x.dtype == torch.float32)
    y, mean, var = in_float32(shifted, *others, of_squares=True)
    return y, mean - 3000.0 * (x.dtype == torch.float32), var


def biased_twice(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = native.batch_norm(*given)
    m = given[0].numel() / given[0].size(1)
    return y, mean, var * (m - 1) / m


def without_last_element(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A tail that is never written, as a wrong mask leaves it."""
    y, mean, var = native.batch_norm(*given)
    left = torch.empty_like(y)
    keep = torch.ones_like(y, dtype=torch.bool)
    keep.view(-1)[-1] = False
    return torch.where(keep, y, left.detach()), mean, var


def other_bits_each_time(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = native.batch_norm(*given)
    return y * (1 + random.choice((-1, 1)) * random.random() * 1e-6), mean, var


def writes_into_the_residual(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    result = native.batch_norm(*given)
    with torch.no_grad():
        given[4].zero_()
    return result


def narrow_result(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = native.batch_norm(*given)
    return y.to(torch.bfloat16), mean, var


WRONG: list[tuple[Any, Case, str]] = [
    (statistics_as_constants, Case((4, 3, 5, 7), "bn+relu", "fp32"), "accuracy"),
    (sums_in_half_precision, Case((8, 3, 9, 9), "bn", "bf16"), "accuracy"),
    (mean_of_squares, Case((4, 3, 5, 7), "bn", "fp32"), "accuracy"),
    (biased_twice, Case((2, 3, 2, 2), "bn", "fp32"), "accuracy"),
    (without_last_element, Case((4, 3, 5, 7), "bn", "fp32"), "accuracy"),
    (other_bits_each_time, Case((4, 3, 5, 7), "bn", "fp32"), "repeatable"),
    (writes_into_the_residual, Case((4, 3, 5, 7), "bn+add+relu", "fp32"), "inputs untouched"),
    (narrow_result, Case((4, 3, 5, 7), "bn", "fp32"), "dtypes and strides"),
]


@pytest.mark.parametrize(("kernel", "case", "claim"), WRONG, ids=[kernel.__name__ for kernel, *_ in WRONG])
def test_a_wrong_kernel_is_caught(kernel: Any, case: Case, claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels_check.CANDIDATES, "seam", kernel)
    assert claim in {check.claim for check in kernels_check.accuracy(case, "seam", "cpu") if not check.passed}


@pytest.mark.parametrize("dtype", cases.DTYPE_NAMES)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_a_right_kernel_that_adds_in_another_order_passes(
    operation: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels_check.CANDIDATES, "seam", in_float32)
    for shape in ((4, 3, 5, 7), (257, 5), (2, 1, 1, 2), (8, 4, 28, 28)):
        for training in (True, False):
            case = Case(shape, operation, dtype, training=training)
            held_to = large(cases.timed(case), CPU, seed=len(shape))
            check = kernels_check.judged(held_to, "seam", "accuracy", case)
            assert check.passed, check


def wrong_of(shape: Large, found: dict[str, Tensor]) -> Finding | None:
    held_to = shape.expected
    evidence = Evidence(held_to.case, shape.part, found, held_to.truth, held_to.floors("kernel"))
    return judged(evidence, {}, shape.native).wrong


def test_half_precision_is_held_to_twice_natives_own_error() -> None:
    case = Case((8, 4, 28, 28), "bn+add+relu", "bf16")
    shape = large(cases.timed(case), CPU)
    truth = shape.expected.truth
    for name in ("forward", "dx"):
        for times, right in ((1.9, True), (2.1, False)):
            found = truth | {name: truth[name] + times * (shape.native[name] - truth[name])}
            assert (wrong_of(shape, found) is None) is right


def test_nan_where_a_number_belongs_is_never_within_a_bound() -> None:
    case = Case((4, 3, 5, 7), "bn", "fp32")
    shape = large(cases.timed(case), CPU)
    found = {name: t.clone() for name, t in shape.expected.truth.items()}
    assert wrong_of(shape, found) is None
    found["dbias"][1] = torch.nan
    wrong = wrong_of(shape, found)
    assert wrong is not None
    assert (wrong.kind, wrong.quantity, wrong.at) == ("nan_unexpected", "dbias", (1,))


def test_a_graph_is_held_to_eager_calls_on_new_values_and_on_running_statistics() -> None:
    case = Case((4, 3, 5, 7), "bn+add+relu", "fp32")

    def faithful(case: Case, kernel: str, device: torch.device, seed: int) -> kernels_hazards.Captured:
        inputs = kernels_check.make(case, device, seed)
        forward = kernels_check.apply(case, kernel)
        found = kernels_hazards.step(forward, inputs)

        def replay() -> None:
            for name, t in kernels_hazards.step(forward, inputs).items():
                found[name].copy_(t)

        return kernels_hazards.Captured(replay, inputs, found)

    def stale(case: Case, kernel: str, device: torch.device, seed: int) -> kernels_hazards.Captured:
        captured = faithful(case, kernel, device, seed)
        return kernels_hazards.Captured(lambda: None, captured.inputs, captured.outputs)

    def forgets_the_running_mean(case: Case, kernel: str, device: torch.device, seed: int) -> kernels_hazards.Captured:
        captured = faithful(case, kernel, device, seed)

        def replay() -> None:
            assert captured.inputs.running_mean is not None
            kept = captured.inputs.running_mean.clone()
            captured.replay()
            captured.inputs.running_mean.copy_(kept)

        return kernels_hazards.Captured(replay, captured.inputs, captured.outputs)

    for captured_by, right in ((faithful, True), (stale, False), (forgets_the_running_mean, False)):
        (check,) = kernels_hazards.graph_replays(case, "seam", "cpu", 5, captured_by)
        assert check.passed is right, check


@pytest.mark.cuda
def test_on_a_gpu_graphs_and_streams_of_the_native_kernel_are_right() -> None:
    case = Case((8, 16, 14, 14), "bn+relu", "fp32")
    for checks in (
        kernels_hazards.graph_replays(case, "native", "cuda", 20),
        kernels_hazards.two_streams(case, "native", "cuda", 20),
        kernels_hazards.under_autocast(case, "native", "cuda"),
    ):
        assert all(check.passed for check in checks), checks


# --- processes that check -----------------------------------------------------------------------------------------


def right(case: str) -> list[Check]:
    return [Check("right", case, True)]


def breaks(case: str) -> list[Check]:
    raise RuntimeError(f"no {case}\nwith a second line")


def dies(case: str) -> list[Check]:
    os._exit(7)


def hangs(case: str) -> list[Check]:
    time.sleep(600)
    return right(case)


def test_a_case_that_dies_or_hangs_fails_alone_and_the_others_are_checked() -> None:
    """The hang comes first, with a short limit; from then on the limit is one that no busy machine meets."""
    pool = Pool(jobs=1, limit_s=0.2)
    found = {}
    try:
        for task, checks in pool.checked([Task(one, ("a case",)) for one in (hangs, dies, breaks, right)]):
            found[task.function] = checks[0]
            pool.limit_s = 600.0
    finally:
        pool.close()
    assert {one.__name__ for one, check in found.items() if not check.passed} == {"dies", "hangs", "breaks"}
    assert "exit code 7" in found[dies].detail
    assert "a hang?" in found[hangs].detail
    assert found[breaks].detail == "RuntimeError: no a case"
    assert found[right].passed


# --- the arithmetic of the verdicts -------------------------------------------------------------------------------


def test_the_floor_is_five_tensors_and_seven_and_two_bits_an_element_with_the_residual() -> None:
    plain, added = (Case((2, 8, 4, 4), operation, "bf16") for operation in ("bn+relu", "bn+add+relu"))
    n = plain.tensor_bytes
    assert n == 2 * 8 * 16 * 2
    assert [cases.floor_bytes(plain, d) / n for d in ("forward", "backward", "both")] == [2, 3, 5]
    assert [cases.floor_bytes(added, d) / n for d in ("forward", "backward", "both")] == [
        3 + 1 / 16,
        4 + 1 / 16,
        7 + 2 / 16,
    ]


def timed(case: Case, what: str = "device", cold: bool = True, **samples_ms: float) -> Timed:
    return Timed(case, "both", what, cold, {name: (ms,) * 3 for name, ms in samples_ms.items()})


LARGE = (256, 64, 56, 56)


def test_a_large_tensor_is_held_to_the_copy_to_eager_and_to_compile() -> None:
    case = Case(LARGE, "bn+relu", "bf16")
    copy_gb_per_s = 4000.0
    at_90_percent_ms = cases.floor_bytes(case, "both") / (0.9 * copy_gb_per_s * 1e6)
    one = timed(case, fused=at_90_percent_ms, eager=2.5 * at_90_percent_ms, compile=1.5 * at_90_percent_ms)
    share, eager, compiled = kernels_speed.targets(one, "fused", copy_gb_per_s)
    assert (share.value, share.at_least, share.met) == (pytest.approx(0.9), 0.85, True)
    assert (eager.value, eager.at_least, eager.met) == (pytest.approx(2.5), 2.2, True)
    assert (compiled.value, compiled.at_least, compiled.met) == (pytest.approx(1.5), 1.6, False)


def test_half_precision_in_channels_last_is_held_to_cudnn_and_a_small_tensor_to_not_being_slower() -> None:
    rows = Case(LARGE, "bn", "fp16", "channels_last")
    (cudnn,) = kernels_speed.targets(timed(rows, fused=1.0, eager=1.1), "fused", 4000.0)
    assert (cudnn.name, cudnn.at_least) == ("fp16 channels_last bn, against cuDNN", 1.0)
    small = Case((8, 64, 14, 14), "bn")
    for what, count in (("device", 1), ("loop", 1), ("host", 0)):
        found = kernels_speed.targets(timed(small, what, False, fused=1.0, eager=0.95), "fused", 4000.0)
        assert [target.met for target in found] == [True] * count
    assert not kernels_speed.targets(timed(Case(LARGE, "bn"), cold=False, fused=1.0, eager=1.0), "fused", 4000.0)


def test_a_target_that_was_not_measured_is_not_met() -> None:
    assert not Target("speed", None, 1.0).met


def test_the_summary_counts_where_a_target_was_met_and_names_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(None)
    for case, value in (("a", 1.5), ("b", 0.8), ("c", 1.2)):
        report.target(case, [Target("against eager", value, 1.0)])
    report.summary()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("against eager"))
    assert "2 of 3  NOT MET (worst: b)" in row


def test_a_sweep_weighs_each_shape_by_its_calls() -> None:
    rows = [kernels_sweep.Calls((2, 3), 80), kernels_sweep.Calls((4, 5), 15), kernels_sweep.Calls((6, 7), 5)]
    found = kernels_sweep.summed_up(list(zip(rows, (2.0, 0.95, 0.5), strict=True)), "loop", 200)
    assert (found.timed_calls, found.all_calls, found.not_slower, found.not_under) == (100, 200, 0.80, 0.95)
    assert (found.slowest, found.slowest_shape) == (0.5, (6, 7))
    assert found.geometric_mean == pytest.approx(2.0**0.8 * 0.95**0.15 * 0.5**0.05)


def test_the_networks_batch_norms_are_those_that_are_checked_before_it_is_timed() -> None:
    """Shapes met in a real forward pass of the full network, without its arithmetic."""
    met = set()
    with torch.device("meta"):
        model = kernels_resnet.ResNet()
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for module in norms:
            module.register_forward_hook(lambda module, args, _: met.add(tuple(args[0].shape)))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert len(norms) == 53
    assert met == {case.shape for case in kernels_resnet.norm_cases(kernels_resnet.Setting(2, 224, small=False))}
