"""What `bncli gradcheck` says in words of errors, failures, evidence and tolerances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bncli.report.gradcheck.text import (
    EVIDENCE,
    TOLERANCES,
    evidence_text,
    failure_text,
    in_tolerances,
    not_checked_text,
)
from bncli.results.finding import Finding
from bncli.results.gradcheck import Diagnosis, Facet, FailureSummary, NotChecked
from tests.report.gradcheck.made_up_checks import FIRST, OFF


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.0, "0"), (0.004, "< 0.01"), (0.887, "0.89"), (1.25, "1.25"), (8452.0, "8,452.00"), (1.25e6, "1.2e+06"),
     (math.inf, "inf"), (math.nan, "nan"), (None, "–")],
)  # fmt: skip
def test_an_error_in_tolerances_is_short(error: float | None, words: str) -> None:
    assert in_tolerances(error) == words


SHOWN = "train-float32-4x3x5x5-relu-dx: dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5"


@pytest.mark.parametrize(
    ("diagnosis", "text"),
    [
        (Diagnosis("NaN leaks into other channels", first=FIRST), SHOWN),
        (Diagnosis("it raises", first=FIRST, alike=3, of=9), f"3 of 9 calls; {SHOWN}"),
        (
            Diagnosis("one-pass variance, E[x^2] - E[x]^2", first=FIRST, relative_errors={"100": 1e-5, "1000": 0.063}),
            "relative errors by mean/deviation: 1e-05 at 100, 0.063 at 1000; "
            "dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5",
        ),
        (
            Diagnosis("less accurate than native", first=FIRST, alike=2, of=7, of_native=3.14),
            "2 of 7 cases miss by little, up to 3.1 times native's error; the worst, 1.2e+06 tolerances, is "
            f"{SHOWN}. Sums or a variance taken in order can lose as much",
        ),
        (
            Diagnosis(
                "no bug that is known here",
                summary=FailureSummary(
                    quantities=("dx",),
                    clean=("forward",),
                    failing=2,
                    cases=40,
                    facets=(
                        Facet("shape", ("1x2x71x71",), ("4x3",)),
                        Facet("dtype", ("float16", "bfloat16", "float32"), ("float64",)),
                    ),
                    groups=tuple(f"group {k}" for k in range(8)),
                ),
            ),
            "what fails: dx (clean: forward); 2 of 40 plain cases; shape 1x2x71x71 alone; every dtype but float64; "
            "besides: group 0, group 1, group 2, group 3, group 4, group 5 and 2 more",
        ),
        (
            Diagnosis("no bug that is known here", summary=FailureSummary((), (), 0, 40, (), ("empty batch",))),
            "what fails, every plain case being right: empty batch",
        ),
    ],
)
def test_the_evidence_in_words(diagnosis: Diagnosis, text: str) -> None:
    assert evidence_text(diagnosis) == text


def test_of_the_results_at_a_hard_input_the_worst_is_named() -> None:
    assert failure_text(replace(FIRST, section="hard inputs")).startswith("dx: dx[0, 1, 2, 2] is 0.75")
    of_its_own = replace(FIRST, section="hard inputs", call=None, finding=replace(OFF, at=None, allowed=0.1))
    assert failure_text(of_its_own) == "dx is 0.75; expected 0.25 within 0.1"


def test_a_refusal_is_told_in_the_kernels_own_words() -> None:
    raised = Finding("raised", exception="TypeError", text="no half precision")
    assert (
        not_checked_text(NotChecked("refused", raised)) == "the kernel refuses it: raised TypeError: no half precision"
    )
    assert not_checked_text(None) is None


def test_the_numbers_in_the_words_are_those_that_are_used() -> None:
    from bncli.measure.gradcheck import derivatives, hard_inputs
    from bncli.measure.reference import tolerance

    assert f"(log2 m + {tolerance.ROUNDINGS}) times" in TOLERANCES["kernel"]
    for rule in ("native", "own function"):
        assert f"(sqrt m + {tolerance.ROUNDINGS_ANY}) times" in TOLERANCES[rule]
        assert f"; {tolerance.INTERMEDIATE} half-precision roundings" in TOLERANCES[rule]
    words = f"relative {derivatives.RELATIVE:g} plus absolute {derivatives.ABSOLUTE:g}: central differences with step "
    assert words + f"{derivatives.STEP:g}" in TOLERANCES["finite differences"]
    assert hard_inputs.LIMITS == {1e2: 1e-6, 1e3: 1e-6, 1e4: 5e-6}
    assert "1e-6 at mean/deviation 1e2 and 1e3, 5e-6 at 1e4" in TOLERANCES["variance"]


def test_what_is_said_of_a_bug_belongs_to_one_that_is_named() -> None:
    import inspect

    from bncli.measure.gradcheck import symptoms

    source = inspect.getsource(symptoms)
    assert all(f'"{bug}"' in source for bug in EVIDENCE)
