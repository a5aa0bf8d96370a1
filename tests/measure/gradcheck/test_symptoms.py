"""Bugs that are recognised by the fields of what failed; the words that are made of them play no part."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.measure.gradcheck.diagnose import diagnose
from bncli.measure.gradcheck.hard_inputs import NOT_FINITE, STRIDED_G, STRIDED_X
from bncli.measure.gradcheck.symptoms import SYMPTOMS, Symptom
from bncli.measure.reference.case import Case
from bncli.measure.reference.judge import Check, Outcome, Verdict
from bncli.results.finding import Finding, FindingKind
from bncli.results.gradcheck import Facet

CASE = Case("train", "float32", "contiguous", (4, 3, 5, 7))
RIGHT = Finding("right", error=0.1)


def verdict(
    finding: Finding = RIGHT,
    quantity: str = "",
    *,
    section: str = "values",
    name: str = "",
    row: str = "",
    case: Case | None = CASE,
    variant: str = "",
    parameter: float | None = None,
) -> Verdict:
    identifier = case.identifier if case else f"{section}/{name}/{parameter}"
    check = Check(section, identifier, lambda: Outcome({}), name, case, parameter, variant)
    return Verdict(check, row, quantity, finding)


def hard(kind: FindingKind, row: str, case: Case = CASE, variant: str = "", **fields: object) -> Verdict:
    finding = Finding(kind, "dx", **fields)  # type: ignore[arg-type]
    return verdict(finding, section="hard inputs", row=row, case=case, variant=variant)


def symptom(bug: str) -> Symptom:
    """The symptom of that bug that leaves other failures to be explained."""
    return next(each for each in SYMPTOMS if each.bug == bug and not each.decisive)


def bugs(*verdicts: Verdict) -> list[str]:
    return [diagnosis.bug for diagnosis in diagnose(list(verdicts), "layer")]  # without the known bugs of batch norm


def test_where_nothing_fails_nothing_is_diagnosed() -> None:
    assert bugs(verdict(RIGHT, "forward")) == []


@pytest.mark.parametrize(
    ("kind", "bug"),
    [
        ("wrong_type", "the output has a wrong type, shape, dtype or device"),
        ("wrong_device", "the output has a wrong type, shape, dtype or device"),
        ("input_written", "an input is modified"),
        ("running_moved", "an input is modified"),
        ("leaf_written", "an input is modified"),
        ("saved_written", "a tensor saved for the backward pass is modified"),
        ("raised", "the kernel raises an exception"),
    ],
)
def test_what_is_wrong_with_whole_calls_explains_all_other_failures(kind: FindingKind, bug: str) -> None:
    noise = verdict(Finding("not_deterministic", names=("forward",)), section="invariants", name="same-bits")
    assert bugs(verdict(Finding(kind), "forward"), noise) == [bug]


def test_calls_that_raise_are_reported_besides_wrong_numbers() -> None:
    raised = verdict(Finding("raised", exception="ValueError", text="no"), "forward")
    off = [verdict(Finding("off", "forward", 1e5), "forward", case=replace(CASE, shape=(4, 3, k))) for k in (2, 3)]
    found = symptom("the kernel raises an exception").recognise([raised, *off, verdict(RIGHT, "forward")])
    assert found is not None
    assert (found.bug, found.alike, found.of) == ("the kernel raises an exception", 1, 4)
    assert found.first == raised.failure()
    assert not any(each.decisive and each.recognise([raised, *off]) for each in SYMPTOMS)


def far(*relative: float | None) -> list[Verdict]:
    return [
        verdict(
            Finding("off", error=1e4 if error is None or error > 1e-5 else 0.5, relative=error),
            section="hard inputs",
            name="variance",
            case=None,
            parameter=ratio,
        )
        for ratio, error in zip((1e2, 1e3, 1e4), relative, strict=True)
    ]


def test_an_error_of_the_variance_that_grows_as_the_square_is_one_pass() -> None:
    one_pass = symptom("one-pass variance, E[x^2] - E[x]^2").recognise
    found = one_pass(far(1e-3, 0.1, 1.0))
    assert found is not None
    assert found.relative_errors == {"100": 1e-3, "1000": 0.1, "10000": 1.0}
    assert one_pass(far(1e-3, 0.01, 1.0)) is None  # as the ratio itself
    assert one_pass(far(None, None, None)) is None  # it raised
    near_zero = verdict(Finding("off", "forward", 9.0), "forward")
    assert one_pass([near_zero, *far(1e-3, 0.1, 1.0)]) is None


def test_a_little_error_and_a_variance_that_is_worse_far_from_zero_is_less_accurate() -> None:
    less_accurate = symptom("less accurate than native").recognise
    little = verdict(Finding("off", "dx", 3.0, of_native=2.5), "dx")
    found = less_accurate([*far(1e-6, 2e-5, 2e-4), little, verdict()])
    assert found is not None
    assert (found.alike, found.of, found.of_native) == (3, 5, 2.5)
    assert less_accurate([*far(1e-6, 2e-3, 2e-2), little]) is None  # more than an update in order loses
    assert less_accurate([*far(2e-5, 2e-5, 2e-5), little]) is None  # it does not grow
    assert less_accurate([verdict(Finding("off", "dx", 30.0), "dx")]) is None
    half = replace(CASE, dtype="bfloat16")
    assert less_accurate([verdict(Finding("off", "dx", 3.0), "dx", case=half)]) is None
    one_pass = [*far(1e-6, 2e-5, 2e-4), verdict(Finding("off", "double backward in x", 3.0), "double backward")]
    assert bugs(*one_pass) == ["less accurate than native"]  # and no wrong second derivative


def test_failures_in_half_precision_alone_are_statistics_kept_in_it() -> None:
    half = verdict(Finding("off", "running_var", 900.0), "running_var", case=replace(CASE, dtype="float16"))
    assert symptom("half-precision statistics").recognise([half, verdict()]) is not None
    assert symptom("half-precision statistics").recognise([half, verdict(Finding("off", "dx"), "dx")]) is None


def test_the_kind_of_a_wrong_number_near_a_nan_names_the_bug() -> None:
    relu = replace(CASE, fusion="relu")
    swallowed = hard("nan_missing", NOT_FINITE, found=1.0, expected=math.nan)
    leaks = hard("nan_unexpected", NOT_FINITE, found=math.nan, expected=1.0)
    derivative = hard("off", NOT_FINITE, relu, found=0.0, expected=1.0)
    assert bugs(swallowed) == ["NaN disappears"]
    assert bugs(leaks) == ["NaN leaks into other channels"]
    assert bugs(derivative) == ["the activation's derivative at NaN is not torch's"]
    assert "NaN disappears" not in bugs(swallowed, verdict(Finding("off", "dx", 1e5), "dx"))
    infinite = hard("off", NOT_FINITE, relu, found=0.0, expected=math.inf)
    assert symptom("the activation's derivative at NaN is not torch's").recognise([infinite]) is None


def test_gross_failures_with_odd_strides_name_the_strided_tensor() -> None:
    gradient = hard("off", STRIDED_G, variant="expanded")
    both = hard("off", STRIDED_X, variant="broadcast")
    x = hard("off", STRIDED_X, variant="transposed")
    assert bugs(gradient) == ["upstream gradient read as contiguous"]
    assert bugs(gradient, both)[0] == "upstream gradient read as contiguous"
    assert bugs(x, gradient) == ["an input's strides are ignored"]
    small = replace(x, finding=replace(x.finding, error=20.0))
    assert symptom("an input's strides are ignored").recognise([small]) is None


def test_a_second_derivative_that_fails_alone_is_missing_or_wrong() -> None:
    missing = verdict(Finding("no_second_derivative"), "double backward")
    wrong = verdict(Finding("off", "double backward in x", 1e6), "double backward")
    assert bugs(missing) == ["no second derivative"]
    assert bugs(wrong) == ["a wrong second derivative"]
    first = verdict(Finding("off", "dx", 1e6), "dx")
    assert "second derivative" not in " ".join(bugs(wrong, first))


def test_no_second_derivative_is_not_named_where_first_ones_fail_in_most_plain_cases() -> None:
    missing = verdict(Finding("no_second_derivative"), "double backward")
    others = [replace(CASE, shape=(4, 3, k)) for k in (2, 3)]
    first = [verdict(Finding("off", "dx", 1e6), "dx", case=case) for case in others]
    assert "no second derivative" in bugs(missing, first[0])
    assert "no second derivative" not in bugs(missing, *first)


def test_an_output_without_a_gradient_is_the_first_diagnosis() -> None:
    text = "element 0 of tensors does not require grad and does not have a grad_fn"
    lost = [verdict(Finding("no_graph", exception="RuntimeError", text=text), name) for name in ("dx", "dweight")]
    empty = verdict(Finding("off", "dx"), "dx", section="invariants", name="empty")
    assert bugs(verdict(RIGHT, "forward"), *lost, empty)[0] == "the output carries no gradient"


def test_an_unknown_bug_lists_what_fails_and_what_passes() -> None:
    large = replace(CASE, shape=(1, 2, 71, 71))
    verdicts = [
        verdict(RIGHT, "forward"),
        verdict(RIGHT, "dx"),
        verdict(RIGHT, "forward", case=large),
        verdict(Finding("off", "dx", 1e6), "dx", case=large),
        verdict(Finding("off", "the sum of dx", 1e6), section="invariants", name="sum-dx", row="sum of dx is 0"),
    ]
    (diagnosis,) = diagnose(verdicts, "layer")
    assert diagnosis.bug == "unknown bug"
    summary = diagnosis.summary
    assert summary is not None
    assert (summary.quantities, summary.clean) == (("dx",), ("forward",))
    assert (summary.failing, summary.cases) == (1, 2)
    assert summary.facets == (Facet("shape", ("1x2x71x71",), ("4x3x5x7",)),)
    assert summary.groups == ("sum of dx is 0",)
