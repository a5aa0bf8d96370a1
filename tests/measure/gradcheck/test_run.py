from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import torch

from bncli.cli.gradcheck import rerun_command
from bncli.errors import Unavailable, UsageError
from bncli.measure.gradcheck.run import run
from bncli.names import GRADCHECK_KERNELS
from bncli.report.gradcheck.text import evidence_text, failure_text, not_checked_text
from bncli.results.gradcheck import CheckGroup, Gradcheck
from tests.measure.reference import wrong_kernels

HERE = "tests.measure.reference.wrong_kernels"


def result(kernel: str = "native", **options) -> Gradcheck:
    """The last of what a run yields; the user's functions are those of wrong_kernels."""
    own = kernel not in GRADCHECK_KERNELS
    *groups, last = run(kernel=f"{HERE}:{kernel}" if own else kernel, device="cpu", allow_code=own, **options)
    assert isinstance(last, Gradcheck)
    assert list(last.groups) == groups
    return last


def told(found: Gradcheck) -> str:
    return "; ".join(f"{failure.case}: {failure_text(failure)}" for failure in found.failures)


# --- what is right passes ---------------------------------------------------------------------------------------------


SLOW_DEFAULT = pytest.param("default", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("norm", "effort"),
    [("batch", "default"), *((norm, "quick") for norm in ("batch", "layer", "group", "instance"))],
)
def test_the_native_kernel_passes(norm: str, effort: str) -> None:
    found = result(norm=norm, effort=effort)
    assert found.passed, told(found)
    assert not found.diagnoses
    assert not found.failures
    assert found.paths


@pytest.mark.parametrize("effort", ["quick", SLOW_DEFAULT])
def test_the_fused_kernel_passes_in_c(effort: str) -> None:
    found = result("fused", effort=effort)
    assert found.passed, told(found)
    assert found.ran.startswith("C, compiled for this CPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is compiling for the GPU in this process")
def test_the_gpus_kernel_is_checked_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = result("fused-interpreted", only="train/float32/contiguous/4x3x5x7/plain/*")
    assert found.passed, told(found)
    assert "Triton's interpreter" in found.ran


@pytest.mark.parametrize("effort", ["quick", SLOW_DEFAULT])
@pytest.mark.parametrize("kernel", wrong_kernels.RIGHT)
def test_a_correct_function_of_the_users_own_passes(kernel: str, effort: str) -> None:
    found = result(kernel, effort=effort)
    assert found.passed, told(found)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "group", "instance"])
def test_the_other_norms_pass_the_default_run(norm: str) -> None:
    assert result(norm=norm).passed


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["native", *wrong_kernels.RIGHT])
def test_correct_kernels_pass_every_case_of_every_seed(kernel: str) -> None:
    found = result(kernel, effort="full")
    assert found.passed, told(found)


@pytest.mark.parametrize("kernel", wrong_kernels.RIGHT_BUT_ROUNDED_OTHERWISE)
def test_a_correct_function_that_rounds_otherwise_passes(kernel: str) -> None:
    found = result(kernel, effort="quick")
    assert found.passed, told(found)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", wrong_kernels.RIGHT_BUT_ROUNDED_OTHERWISE)
def test_a_correct_function_that_rounds_otherwise_passes_the_default_run(kernel: str) -> None:
    found = result(kernel)
    assert found.passed, told(found)


@pytest.mark.parametrize("kernel", wrong_kernels.LESS_ACCURATE)
def test_a_variance_taken_in_order_is_called_less_accurate_and_no_bug(kernel: str) -> None:
    found = result(kernel, effort="quick")
    assert [group.name for group in found.groups if group.failed] == ["variance far from zero"]
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
    found = result("exits", effort="quick")
    assert not found.passed
    assert "SystemExit" in failure_text(found.failures[0])


@pytest.mark.parametrize("kernel", ["wrong_without_gradients", "drops_gradients_of_a_frozen_input"])
def test_another_way_where_no_gradient_is_asked_for_is_checked_too(kernel: str) -> None:
    found = result(kernel, effort="quick")
    assert [group.name for group in found.groups if group.failed] == ["the same without gradients, and with x frozen"]


@pytest.mark.parametrize("kernel", wrong_kernels.BUGS)
def test_every_wrong_kernel_is_caught_by_the_quick_run_and_named_first(kernel: str) -> None:
    found = result(kernel, effort="quick")
    assert not found.passed
    assert found.failures
    assert wrong_kernels.BUGS[kernel] in found.diagnoses[0].bug
    assert evidence_text(found.diagnoses[0])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", wrong_kernels.BUGS)
def test_every_wrong_kernel_is_named_by_the_default_run(kernel: str) -> None:
    assert wrong_kernels.BUGS[kernel] in result(kernel).diagnoses[0].bug


@pytest.mark.parametrize("kernel", wrong_kernels.UNKNOWN)
def test_a_bug_without_a_name_is_caught_and_told_by_what_fails_and_what_is_clean(kernel: str) -> None:
    found = result(kernel, effort="quick")
    assert not found.passed
    assert [diagnosis.bug for diagnosis in found.diagnoses] == ["no bug that is known here"]
    for words in wrong_kernels.UNKNOWN[kernel]:
        assert words in evidence_text(found.diagnoses[0])


def test_an_input_that_one_operation_alone_writes_to_is_found_in_its_own_case() -> None:
    found = result("relu_writes", only="train/float32/contiguous/4x3x5x7/relu/forward")
    assert "x changed during the call" in failure_text(found.failures[0])


def test_statistics_that_an_evaluation_moves_are_found() -> None:
    found = result("moved_in_evaluation", effort="quick")
    assert "an input is written to" in found.diagnoses[0].bug
    assert "running_mean changed during the call, in evaluation" in evidence_text(found.diagnoses[0])


def test_the_evidence_holds_the_distances_to_the_wrong_kernel_and_to_the_truth() -> None:
    evidence = evidence_text(result("statistics_constant", effort="quick").diagnoses[0])
    assert "equals the direct part alone to" in evidence
    assert "misses the true one by" in evidence


# --- what could not be checked is said --------------------------------------------------------------------------------


def skipped(found: Gradcheck) -> dict[str, str]:
    return {group.name: not_checked_text(group.skipped) for group in found.groups if group.skipped}


def test_a_dtype_that_is_refused_is_a_group_with_the_reason_and_not_a_failure() -> None:
    found = result("full_precision_only", effort="quick")
    assert found.passed, told(found)
    assert "half precision is not supported" in skipped(found)["float16"]
    assert "bfloat16" in skipped(found)


def test_a_seam_without_statistics_is_not_checked_in_evaluation() -> None:
    found = result("right_without_evaluation", effort="quick")
    assert "no evaluation mode" in skipped(found)["evaluation"]
    assert not any(group.name.startswith("eval ") for group in found.groups)


def test_a_mode_or_an_operation_that_is_not_implemented_is_told_and_left_out() -> None:
    found = result("training_alone", effort="quick")
    assert found.passed, told(found)
    assert "fold the statistics" in skipped(found)["eval"]
    assert all(group.name for group in found.groups)
    found = result("no_silu", effort="quick")
    assert found.passed, told(found)
    assert "no silu" in skipped(found)["silu"]


# --- identifiers ------------------------------------------------------------------------------------------------------


def test_a_failures_command_runs_that_case_alone_and_fails_again() -> None:
    found = result("statistics_constant", effort="quick")
    failure = found.failures[0]
    assert shlex.join(rerun_command(found, failure)) == (
        f"bncli gradcheck --kernel {HERE}:statistics_constant --device cpu --allow-code --only {failure.case}"
    )
    again = result("statistics_constant", only=failure.case)
    assert [group.cases for group in again.groups] == [1]
    assert again.failures[0] == failure
    assert "statistics treated as constants" in again.diagnoses[0].bug


def test_an_identifier_without_its_quantity_runs_all_of_them() -> None:
    found = result(only="train/bfloat16/channels_last/4x3x5x7/relu+residual")
    assert {group.name for group in found.groups} == {
        f"train {name}"
        for name in (
            *("forward", "running_mean", "running_var", "dx", "dweight", "dbias", "dresidual"),
            "double backward",
        )
    }
    assert all(group.cases == 1 for group in found.groups)


def test_a_glob_runs_what_it_matches() -> None:
    found = result(only="eval/float32/*/dx", effort="quick")
    assert [group.name for group in found.groups] == ["eval dx"]
    assert found.groups[0].cases > 1


def test_a_case_of_the_full_run_is_found_by_its_identifier_alone() -> None:
    assert result(only="train/float16/contiguous/4x3x5x7/silu~3", effort="quick").passed


def test_a_name_that_matches_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="train/float32/contiguous/4x3x5x7/plain") as caught:
        list(run(device="cpu", only="train/float32/contigous/4x3x5x7/plain"))
    assert caught.value.exit_code == 2


def test_two_runs_find_the_same() -> None:
    def figures() -> list[tuple]:
        groups = result("half_precision_statistics", effort="quick", only="train/*").groups
        return [(group.name, group.cases, group.failed, group.worst, group.worst_case) for group in groups]

    assert figures() == figures()


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
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Unavailable):
        next(iter(run(device="cuda")))


def test_groups_come_as_they_finish() -> None:
    first = list(itertools.islice(run(device="cpu", effort="quick"), 2))
    assert all(isinstance(group, CheckGroup) for group in first)
    assert all(group.cases and group.rule for group in first)
