"""The outcome of `bncli gradcheck` in words and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from dataclasses import replace
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree

import pytest

from bncli.cli.gradcheck import rerun_command
from bncli.report.gradcheck.text import (
    EVIDENCE,
    NOT_CHECKED_REASONS,
    TOLERANCES,
    demo_to_json,
    evidence_text,
    failure_text,
    in_tolerances,
    interrupted_to_json,
    not_checked_text,
    reasons,
    to_csv,
    to_json,
    to_junit,
    to_latex,
    to_markdown,
)
from bncli.results.finding import Finding
from bncli.results.gradcheck import (
    BiasStep,
    CheckGroup,
    Diagnosis,
    Facet,
    FailureSummary,
    Gradcheck,
    NotChecked,
    ToleranceRule,
)
from bncli.results.serialize import from_plain
from tests.report.conftest import check_latex
from tests.report.gradcheck.made_up_checks import BAD, FIRST, GOOD, GROUPS, OFF, RULE, STEPS


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
        (Diagnosis("the kernel raises an exception", first=FIRST, alike=3, of=9), f"3 of 9 calls; {SHOWN}"),
        (
            Diagnosis("one-pass variance, E[x^2] - E[x]^2", first=FIRST, relative_errors={"100": 1e-5, "1000": 0.063}),
            "relative errors by mean/deviation: 1e-05 at 100, 0.063 at 1000; "
            "dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5",
        ),
        (
            Diagnosis("less accurate than native", first=FIRST, alike=2, of=7, of_native=3.14),
            "2 of 7 cases barely exceed their tolerance, up to 3.1 times native's error; the worst, 1.2e+06 "
            f"tolerances, is {SHOWN}. A sequential sum or variance can lose as much",
        ),
        (
            Diagnosis(
                "unknown bug",
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
            "what fails: dx (clean: forward); 2 of 40 plain cases; only shape 1x2x71x71; every dtype except float64; "
            "what else fails: group 0, group 1, group 2, group 3, group 4, group 5 and 2 more",
        ),
        (
            Diagnosis("unknown bug", summary=FailureSummary((), (), 0, 40, (), ("empty batch",))),
            "every plain case passes; what fails: empty batch",
        ),
    ],
)
def test_the_evidence_in_words(diagnosis: Diagnosis, text: str) -> None:
    assert evidence_text(diagnosis) == text


def test_the_worst_result_at_a_hard_input_is_named() -> None:
    assert failure_text(replace(FIRST, section="hard inputs")).startswith("dx: dx[0, 1, 2, 2] is 0.75")
    of_its_own = replace(FIRST, section="hard inputs", call=None, finding=replace(OFF, at=None, allowed=0.1))
    assert failure_text(of_its_own) == "dx is 0.75; expected 0.25 within 0.1"


def test_a_refusal_quotes_the_kernel() -> None:
    raised = Finding("raised", exception="TypeError", text="no half precision")
    assert (
        not_checked_text(NotChecked("refused", raised)) == "the kernel refuses it: raised TypeError: no half precision"
    )
    assert not_checked_text(None) is None
    assert set(NOT_CHECKED_REASONS) == set(get_args(get_type_hints(NotChecked)["reason"]))
    assert set(TOLERANCES) == set(get_args(ToleranceRule))


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


def test_every_evidence_belongs_to_a_known_bug() -> None:
    import inspect

    from bncli.measure.gradcheck import symptoms

    source = inspect.getsource(symptoms)
    assert all(f'"{bug}"' in source for bug in EVIDENCE)


# --- JSON ---------------------------------------------------------------------------------------------------------


def commands_of(result: Gradcheck) -> list[list[str]]:
    return [rerun_command(result, failure) for failure in result.failures]


def json_of(result: Gradcheck) -> str:
    return to_json(result, commands_of(result))


def facts(plain: dict[str, Any]) -> dict[str, Any]:
    """JSON without what it says in words beside its fields."""
    words = {"groups": ("tolerance", "not_checked"), "failures": ("message", "reproduce"), "diagnoses": ("evidence",)}
    for name, fields in words.items():
        for each in plain.get(name, ()):
            for field in fields:
                each.pop(field)
    return plain


@pytest.mark.parametrize("result", [GOOD, BAD], ids=["good", "bad"])
def test_json_holds_the_whole_result_infinities_included(result: Gradcheck) -> None:
    plain = json.loads(json_of(result), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain.pop("format_version") == 1
    assert plain.pop("passed") is (result is GOOD)
    assert [plain.pop(name) for name in ("cases", "failed", "skipped_groups")] == (
        [174, 0, 1] if result is GOOD else [168, 64, 0]
    )
    assert from_plain(Gradcheck, facts(plain)) == result


def test_json_says_beside_the_fields_what_the_terminal_shows() -> None:
    plain = json.loads(json_of(BAD))
    assert plain["groups"][0]["tolerance"] == TOLERANCES[RULE]
    assert plain["groups"][0]["not_checked"] is None
    assert plain["failures"][0]["case"] == "train-float32-4x3x5x5-relu-dx"
    assert plain["failures"][0]["message"] == "dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5"
    assert plain["failures"][0]["reproduce"].endswith("--allow-code --only train-float32-4x3x5x5-relu-dx")
    assert plain["diagnoses"][0]["evidence"] == evidence_text(BAD.diagnoses[0])
    assert json.loads(json_of(GOOD))["groups"][3]["not_checked"] == "Metal has no float64"


def test_csv_has_a_line_for_each_group() -> None:
    first, *_, skipped, last = csv.DictReader(io.StringIO(to_csv(GOOD)))
    assert (first["section"], first["name"], first["cases"], first["failed"]) == (
        "values",
        "forward, training",
        "96",
        "0",
    )
    assert (first["worst"], first["rule"], first["skipped"]) == ("0.3125", RULE, "")
    assert (skipped["cases"], skipped["worst"], skipped["skipped"]) == ("0", "", "Metal has no float64")
    assert [row["worst"] for row in csv.DictReader(io.StringIO(to_csv(BAD)))] == ["0.3125", "1250000.0", "Infinity"]
    assert last["name"] == "mean far from zero"


def test_markdown_has_the_groups_the_failures_with_their_commands_and_what_was_not_checked() -> None:
    good, bad = (to_markdown(result, commands_of(result)).splitlines() for result in (GOOD, BAD))
    assert "| values | forward, training | 96 | 0.31 | ok | train-float32-4x3x5x5-relu-y |" in good
    assert "- channels\\_last\\_3d in half precision: Metal has no float64" in good
    assert not any("Failures" in line for line in good)
    assert "| values | dx | 48 | 1.2e+06 | 40 FAILED | train-float32-4x3x5x5-relu-dx |" in bad
    place = bad.index("#### Failures") + 2
    assert bad[place].startswith("- train-float32-4x3x5x5-relu-dx: dx\\[0, 1, 2, 2\\] is 0.75; expected 0.25")
    assert bad[place + 1].endswith("--allow-code --only train-float32-4x3x5x5-relu-dx`")
    assert any(line.startswith("- statistics treated as constants, because dx of ") for line in bad)


def test_junit_has_a_test_for_each_group_failed_with_its_first_case_or_skipped_with_the_reason() -> None:
    of_group = replace(FIRST, group="dx")
    result = replace(BAD, failures=(of_group, *BAD.failures[1:]), groups=(*BAD.groups, GROUPS[3]))
    (suite,) = ElementTree.fromstring(to_junit(result, commands_of(result)))
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "2", "errors": "0", "skipped": "1"
    }  # fmt: skip
    passed, failed, other, skipped = suite
    assert (passed.get("classname"), passed.get("name")) == (
        "bncli.gradcheck.mine.kernels:batch_norm.values",
        "forward, training",
    )
    assert not list(passed)
    first, case, command = str(failed[0].text).splitlines()
    assert (failed[0].tag, failed[0].get("message"), first) == (
        "failure",
        first,
        "40 of 48 cases FAILED, by 1.2e+06 tolerances",
    )
    assert case.startswith("train-float32-4x3x5x5-relu-dx: dx[0, 1, 2, 2] is 0.75")
    assert command == shlex.join(commands_of(result)[0])
    assert str(other[0].text) == "24 of 24 cases FAILED, by inf tolerances"
    assert (skipped[0].tag, skipped[0].get("message")) == ("skipped", "Metal has no float64")


def test_a_reason_is_told_once_with_all_of_its_groups() -> None:
    left = replace(GROUPS[3], skipped=NotChecked("left out"))
    groups = (*GROUPS, replace(left, name="float16"), replace(left, name="squares"))
    assert reasons(groups) == [
        "channels_last_3d in half precision: Metal has no float64",
        "float16; squares: left out, since other dtypes were asked for",
    ]


def test_json_of_a_demonstration_and_an_interrupted_check() -> None:
    demo = json.loads(demo_to_json(STEPS))
    assert demo["format_version"] == 1
    assert [from_plain(BiasStep, step) for step in demo["steps"]] == list(STEPS)
    part = json.loads(interrupted_to_json(BAD.groups))
    assert part["format_version"] == 1
    assert part["interrupted"] is True
    assert [from_plain(CheckGroup, group) for group in facts(part)["groups"]] == list(BAD.groups)


def test_the_latex_table_has_a_line_for_each_group():
    text = to_latex(BAD)
    check_latex(text)
    assert text.count("FAILED") >= sum(bool(group.failed) for group in BAD.groups)
