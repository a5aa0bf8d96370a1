"""Whole runs of gradcheck: what is right passes, what is wrong is caught and named, what is left out is said."""

from __future__ import annotations

import functools
import itertools
import shlex
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from bncli.cli.gradcheck import rerun_command
from bncli.engine.models.norms import ignoring_statistics
from bncli.engine.models.whitening import Whitening
from bncli.errors import Unavailable, UsageError
from bncli.measure.gradcheck.run import run, values_plans
from bncli.measure.reference.judge import CheckGroupPlan
from bncli.measure.reference.observe import GRADIENTS, RUNNING, quantities
from bncli.names import CHECKED_NORMS
from bncli.report.gradcheck.text import evidence_text, failure_text, not_checked_text
from bncli.results.gradcheck import CheckGroup, CheckProgress, Effort, Gradcheck, NotChecked
from tests.measure.gradcheck.conftest import context_of, named, whitening_context
from tests.measure.reference import wrong_kernels


@functools.cache  # several tests look at the same run
def result(
    kernel: str = "native", effort: Effort = "quick", norm: str = "batch", only: str = "", dtypes: str = ""
) -> Gradcheck:
    """The last of what a run yields, whose progress ends with every planned case. only, dtypes: words."""
    *events, last = run(named(kernel), norm, "cpu", effort, only.split(), True, dtypes.split())
    assert isinstance(last, Gradcheck)
    assert list(last.groups) == [event for event in events if isinstance(event, CheckGroup)]
    progress = [event for event in events if isinstance(event, CheckProgress)]
    assert progress[0].planned == sum(event.cases for event in progress) == sum(group.cases for group in last.groups)
    return last


def told(found: Gradcheck) -> str:
    return "; ".join(f"{failure.case}: {failure_text(failure)}" for failure in found.failures)


def failing(found: Gradcheck) -> list[str]:
    return [group.name for group in found.groups if group.failed]


# --- the values section -----------------------------------------------------------------------------------------------


def plans(*refused: str, kernel: str = "native", norm: str = "batch", effort: Effort = "quick") -> list[CheckGroupPlan]:
    return list(values_plans(context_of(kernel, norm, effort), refused))


def test_a_whitening_module_is_checked_in_training_alone_and_the_rest_is_said() -> None:
    for norm in ("whiten", "iternorm"):
        found = result(norm=norm)
        (skipped,) = (group for group in found.groups if group.skipped)
        assert (skipped.name, skipped.skipped) == ("evaluation", NotChecked("running covariance"))
        assert found.ran == "bncli's module, 2 channels per group"
        (train,) = plans(norm=norm)
        assert list(train.rows) == ["forward", *GRADIENTS[:3], "double backward"]


def test_a_whitening_of_too_few_steps_or_another_eps_is_wrong_in_every_quantity_that_it_changes() -> None:
    def few_steps(module: Whitening) -> None:
        module.iterations = 3

    def other_eps(module: Whitening) -> None:
        module.eps = 1.1e-3

    for change in (few_steps, other_eps):
        (plan,) = values_plans(whitening_context(change), ())
        check = next(check for check in plan.checks if check.identifier.startswith("train/float32/contiguous/4x4x5x7"))
        wrong = {name for name, finding in check.run().findings.items() if finding.failed}
        assert wrong == {"forward", "dx", "dweight", "double backward"}


def test_each_mode_has_a_row_for_each_quantity_that_the_candidate_has() -> None:
    everything = ("forward", *RUNNING, *GRADIENTS, "double backward")
    train, evaluation = plans()
    assert train.rows == {name: f"train {name}" for name in everything}
    assert evaluation.rows == {name: f"eval {name}" for name in everything if name not in RUNNING}
    assert {plan.section for plan in (train, evaluation)} == {"values"}
    (train,) = plans(kernel="right_without_evaluation")
    assert "dresidual" in train.rows
    assert "dresidual" not in plans(kernel="right")[0].rows
    (layer,) = plans(norm="layer")
    assert list(layer.rows) == ["forward", *GRADIENTS[:3], "double backward"]


def test_a_check_is_a_case_and_is_asked_for_by_the_cases_identifier() -> None:
    checks = [check for plan in plans(effort="default") for check in plan.checks]
    for check in checks:
        assert check.case is not None
        assert check.identifier == check.case.identifier
        assert check.quantities == quantities(check.case)
    assert len({check.identifier for check in checks}) == len(checks)


def test_what_a_kernel_refuses_is_in_no_case() -> None:
    every, left = (
        [check.case for plan in plans(*refused, effort="default") for check in plan.checks]
        for refused in ((), ("float16", "silu"))
    )
    assert left == [case for case in every if case and case.dtype != "float16" and "silu" not in case.fusion.split("+")]
    assert 0 < len(left) < len(every)
    (train,) = [plan for plan in plans("eval") if plan.checks]
    assert {check.case.mode for check in train.checks if check.case} == {"train"}


@pytest.mark.parametrize(("kernel", "rule"), [("native", "native"), ("fused", "kernel"), ("right", "own function")])
def test_the_tolerance_rule_is_that_of_the_candidate(kernel: str, rule: str) -> None:
    assert {plan.rule for plan in plans(kernel=kernel)} == {rule}


@pytest.mark.parametrize(("kernel", "wrong"), [("right", []), ("mean_constant", ["dx", "double backward"])])
def test_a_check_that_is_run_judges_each_of_its_quantities(kernel: str, wrong: list[str]) -> None:
    checks = plans(kernel=kernel)[0].checks
    check = next(check for check in checks if check.identifier.startswith("train/float32/contiguous/5x3x7/"))
    findings = check.run().findings
    assert tuple(findings) == check.quantities
    assert [name for name, finding in findings.items() if finding.failed] == wrong


# --- what is right passes ---------------------------------------------------------------------------------------------

RIGHT = (*wrong_kernels.RIGHT, *wrong_kernels.RIGHT_BUT_ROUNDED_OTHERWISE)
RIGHT_RUNS: list[tuple[str, str, Effort]] = [
    *(("native", norm, "quick") for norm in CHECKED_NORMS),
    *((kernel, "batch", "quick") for kernel in ("fused", *RIGHT)),
]
LONG_RIGHT_RUNS: list[tuple[str, str, Effort]] = [
    *(("native", norm, "default") for norm in CHECKED_NORMS),
    *((kernel, "batch", "default") for kernel in ("fused", *RIGHT)),
    *((kernel, "batch", "full") for kernel in ("native", *wrong_kernels.RIGHT)),
]


@pytest.mark.parametrize(
    ("kernel", "norm", "effort"),
    [*RIGHT_RUNS, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONG_RIGHT_RUNS)],
)
def test_a_correct_kernel_passes(kernel: str, norm: str, effort: Effort) -> None:
    found = result(kernel, effort, norm)
    assert found.passed, told(found)
    assert not found.diagnoses
    assert not found.failures
    assert found.paths


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiling for the GPU in this process")
def test_the_gpus_kernel_is_checked_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = result("fused-interpreted", only="train/float32/contiguous/4x3x5x7/plain/*")
    assert found.passed, told(found)
    assert "Triton's interpreter" in found.ran


@pytest.mark.parametrize("kernel", wrong_kernels.LESS_ACCURATE)
def test_a_variance_taken_in_order_is_called_less_accurate_and_no_bug(kernel: str) -> None:
    found = result(kernel)
    assert failing(found) == ["variance far from zero"]
    assert [diagnosis.bug for diagnosis in found.diagnoses] == ["less accurate than native"]
    assert "times native's error" in evidence_text(found.diagnoses[0])


def test_torchs_own_function_is_taken_by_name() -> None:
    *_, found = run(kernel="torch.nn.functional:batch_norm", device="cpu", effort="quick", allow_code=True)
    assert isinstance(found, Gradcheck)
    skipped = {group.name: not_checked_text(group.skipped) for group in found.groups if group.skipped}
    assert "takes no residual" in str(skipped["residual and activation"])
    assert found.passed, told(found)


# --- what is wrong is caught and named --------------------------------------------------------------------------------


def test_a_kernel_that_exits_fails_and_does_not_end_the_check() -> None:
    found = result("exits")
    assert not found.passed
    assert "SystemExit" in failure_text(found.failures[0])


@pytest.mark.parametrize("kernel", ["wrong_without_gradients", "drops_gradients_of_a_frozen_input"])
def test_the_code_path_without_gradients_is_checked_too(kernel: str) -> None:
    found = result(kernel)
    assert failing(found) == ["the same without gradients, and with x frozen"]


@pytest.mark.parametrize("kernel", wrong_kernels.BUGS)
def test_every_wrong_kernel_is_caught_by_the_quick_run_and_named_first(kernel: str) -> None:
    found = result(kernel)
    assert not found.passed
    assert found.failures
    assert wrong_kernels.BUGS[kernel] in found.diagnoses[0].bug
    assert evidence_text(found.diagnoses[0])


def test_the_recipes_batch_norm_that_ignores_its_statistics_is_wrong_in_exactly_that() -> None:
    kernel = f"{ignoring_statistics.__module__}:{ignoring_statistics.__name__}"
    *_, found = run(kernel, "batch", "cpu", "quick", ["train/float64/contiguous/*"], allow_code=True)
    assert isinstance(found, Gradcheck)
    assert found.diagnoses[0].bug == "statistics treated as constants"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", wrong_kernels.BUGS)
def test_every_wrong_kernel_is_named_by_the_default_run(kernel: str) -> None:
    assert wrong_kernels.BUGS[kernel] in result(kernel, "default").diagnoses[0].bug


@pytest.mark.parametrize("kernel", wrong_kernels.UNKNOWN)
def test_an_unknown_bug_is_caught_and_summarised(kernel: str) -> None:
    found = result(kernel)
    assert not found.passed
    assert [diagnosis.bug for diagnosis in found.diagnoses] == ["unknown bug"]
    for words in wrong_kernels.UNKNOWN[kernel]:
        assert words in evidence_text(found.diagnoses[0])


def test_an_input_that_one_operation_alone_writes_to_is_found_in_its_own_case() -> None:
    found = result("relu_writes", only="train/float32/contiguous/4x3x5x7/relu/forward")
    assert "x changed during the call" in failure_text(found.failures[0])


def test_statistics_that_an_evaluation_moves_are_found() -> None:
    found = result("moved_in_evaluation")
    assert "an input is modified" in found.diagnoses[0].bug
    assert "running_mean changed during the call in evaluation mode" in evidence_text(found.diagnoses[0])


def test_the_evidence_holds_the_distances_to_the_wrong_kernel_and_to_the_truth() -> None:
    evidence = evidence_text(result("statistics_constant").diagnoses[0])
    assert "equals the direct part alone to" in evidence
    assert "differs from the true one by" in evidence


# --- what could not be checked is said --------------------------------------------------------------------------------


def skipped(found: Gradcheck) -> dict[str, str]:
    return {group.name: not_checked_text(group.skipped) for group in found.groups if group.skipped}


def test_a_dtype_that_is_refused_is_a_group_with_the_reason_and_not_a_failure() -> None:
    found = result("full_precision_only")
    assert found.passed, told(found)
    assert "half precision is not supported" in skipped(found)["float16"]
    assert "bfloat16" in skipped(found)


def test_a_kernel_without_statistics_is_not_checked_in_evaluation() -> None:
    found = result("right_without_evaluation")
    assert "no evaluation mode" in skipped(found)["evaluation"]
    assert not any(group.name.startswith("eval ") for group in found.groups)


def test_unimplemented_modes_and_operations_are_reported_and_skipped() -> None:
    found = result("training_alone")
    assert found.passed, told(found)
    assert "fold the statistics" in skipped(found)["eval"]
    assert all(group.name for group in found.groups)
    found = result("no_silu")
    assert found.passed, told(found)
    assert "no silu" in skipped(found)["silu"]


def test_only_the_cases_of_the_dtypes_that_are_asked_for_run_and_the_rest_is_said() -> None:
    found = result("right", dtypes="fp32")
    assert found.passed, told(found)
    assert skipped(found)["float16, bfloat16, float64"] == "left out, since other dtypes were asked for"
    assert "squares past float16" in skipped(found)
    assert {
        group.worst_case.split("/")[1] for group in found.groups if group.name == "train dx" and group.worst_case
    } == {"float32"}
    assert all(1e-9 < each.error < each.bound for each in found.paths)  # of float32, although it takes float64
    half = result("right", dtypes="bf16 fp16")
    assert half.passed, told(half)
    assert not half.paths
    assert skipped(half)["variance far from zero"] == "left out, since other dtypes were asked for"


def float32_alone(input, running_mean, running_var, weight, bias, training, momentum, eps):  # type: ignore[no-untyped-def]
    """Its results are in float32, whatever the input."""
    vectors = [None if each is None else each.float() for each in (running_mean, running_var, weight, bias)]
    y = F.batch_norm(input.float(), *vectors, training, momentum, eps)
    if input.dtype == torch.float32:
        return y
    return y.float()


def test_a_kernel_for_one_dtype_passes_in_that_dtype() -> None:
    kernel = f"{__name__}:float32_alone"
    only = ["train/*/4x3x5x7/plain"]
    for dtypes, passed in ((["fp32"], True), ([], False)):
        *_, found = run(kernel, "batch", "cpu", "quick", only, True, dtypes)
        assert isinstance(found, Gradcheck)
        assert found.passed is passed


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="dtypes fp8: expected some of bf16, fp16, fp32, fp64"):
        next(iter(run(dtypes=["fp32", "fp8"])))


# --- compiled kernels -------------------------------------------------------------------------------------------------

COMPILED = torch.compile(wrong_kernels.right, backend="aot_eager")
COMPILED_WRONG = torch.compile(wrong_kernels.statistics_constant, backend="aot_eager")
FEW = [
    "train/float32/contiguous/*/plain",
    "derivatives/train/gradcheck/*",
    "invariants/same-bits/train/*",
    "hard/one-value/*",
]


def checked_compiled(kernel: str, only: list[str]) -> Gradcheck:
    torch.compiler.reset()
    counters.clear()
    *_, found = run(f"{__name__}:{kernel}", "batch", "cpu", "quick", only, True, ["fp32", "fp64"])
    assert isinstance(found, Gradcheck)
    return found


def test_a_correct_compiled_kernel_passes_and_is_compiled_throughout() -> None:
    found = checked_compiled("COMPILED", FEW)
    assert found.passed, told(found)
    assert {group.section for group in found.groups} == {"values", "derivatives", "invariants", "hard inputs"}
    assert counters["stats"]["unique_graphs"] > 8  # the limit above which torch would run it uncompiled
    assert not counters["unimplemented"].get("Dynamo recompile limit exceeded")


def test_the_double_backward_of_a_compiled_kernel_is_not_checked_and_the_reason_is_said() -> None:
    events = run(f"{__name__}:COMPILED", "batch", "cpu", "quick", (), True, ["fp32"])
    _, *groups = itertools.islice(events, 4)  # behind the plan come the groups that cannot run
    reasons = {group.name: not_checked_text(group.skipped) for group in groups if isinstance(group, CheckGroup)}
    assert "the backward pass of torch.compile cannot be differentiated" in str(reasons["double backward"])


def test_a_wrong_compiled_kernel_is_caught_and_named() -> None:
    found = checked_compiled("COMPILED_WRONG", ["train/float64/contiguous/4x3x5x7/*"])
    assert not found.passed
    assert found.diagnoses[0].bug == "statistics treated as constants"


# --- identifiers ------------------------------------------------------------------------------------------------------


def test_a_failures_command_runs_that_case_alone_and_fails_again() -> None:
    found = result("statistics_constant")
    failure = found.failures[0]
    options = f"--kernel {named('statistics_constant')} --device cpu --quick --allow-code --only {failure.case}"
    assert shlex.join(rerun_command(found, failure)) == f"bncli gradcheck {options}"
    again = result("statistics_constant", "default", only=failure.case)
    assert [group.cases for group in again.groups] == [1]
    assert again.failures[0] == failure
    assert "statistics treated as constants" in again.diagnoses[0].bug


def test_an_identifier_without_its_quantity_runs_all_of_them() -> None:
    found = result(effort="default", only="train/bfloat16/channels_last/4x3x5x7/relu+residual")
    everything = ("forward", *RUNNING, *GRADIENTS, "double backward")
    assert [group.name for group in found.groups] == [f"train {name}" for name in everything]
    assert all(group.cases == 1 for group in found.groups)


def test_a_glob_runs_what_it_matches() -> None:
    found = result(only="eval/float32/*/dx")
    assert [group.name for group in found.groups] == ["eval dx"]
    assert found.groups[0].cases > 1


def test_several_names_and_globs_run_what_any_of_them_matches() -> None:
    found = result(only="eval/float32/*/dx *one-value* *float64/contiguous/4x3x5x7/*/dbias")
    assert {group.name for group in found.groups} == {
        "eval dx",
        "train dbias",
        "eval dbias",
        "one value per channel is refused",
    }


def test_a_case_of_the_full_run_is_found_by_its_identifier_alone() -> None:
    assert result(only="train/float16/contiguous/4x3x5x7/silu~3").passed


def test_a_name_that_matches_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="train/float32/contiguous/4x3x5x7/plain") as caught:
        list(run(device="cpu", only=["*float32*", "train/float32/contigous/4x3x5x7/plain"]))
    assert caught.value.exit_code == 2


def test_a_name_that_resembles_none_is_answered_with_the_groups_of_names() -> None:
    with pytest.raises(UsageError, match=r"The nearest are train/\*, eval/\*"):
        list(run(device="cpu", only=["nothing"]))


def test_a_case_of_another_dtype_is_answered_with_the_dtypes_left_out() -> None:
    with pytest.raises(UsageError, match=r"have other dtypes\. Left out: bfloat16, float16, float32"):
        list(run(device="cpu", only=["hard/one-value"], dtypes=["fp64"]))


def test_the_beginning_of_names_is_answered_with_the_glob_that_runs_them() -> None:
    with pytest.raises(
        UsageError, match=r"only eval/float64: no case of that name\. [\d,]+ begin with it: eval/float64\*"
    ):
        list(run(device="cpu", only=["eval/float64"]))


def test_two_runs_find_the_same() -> None:
    first, second = (result.__wrapped__("half_precision_statistics", only="train/*").groups for _ in range(2))
    assert first == second


# --- the user's own function ------------------------------------------------------------------------------------------


def test_the_current_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch.nn import functional as F\ndef norm(*, " + ", ".join(
        ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    )
    (tmp_path / "own_norm_for_gradcheck.py").write_text(f"{code}):\n    raise RuntimeError('as told')\n")
    monkeypatch.chdir(tmp_path)
    *_, found = run(kernel="own_norm_for_gradcheck:norm", device="cpu", effort="quick", allow_code=True)
    assert isinstance(found, Gradcheck)
    assert not found.passed
    assert "RuntimeError: as told" in failure_text(found.failures[0])


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="device tpu: expected one of"):
        next(iter(run(device="tpu")))


def test_a_device_that_is_not_here_is_unavailable() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Unavailable):
        next(iter(run(device="cuda")))


def test_groups_come_as_they_finish() -> None:
    events = run(device="cpu", effort="quick")
    first = list(itertools.islice((event for event in events if isinstance(event, CheckGroup)), 2))
    assert all(group.cases and group.rule for group in first)
    assert all(group.seconds > 0 for group in first)
