"""The outcome of `bncli gradcheck` as JSON: all its fields, and what they say in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bncli.cli.gradcheck import rerun_command
from bncli.report.gradcheck import export
from bncli.report.gradcheck.text import TOLERANCES, evidence_text
from bncli.results.gradcheck import BiasStep, CheckGroup, Gradcheck
from bncli.results.serialize import from_plain
from tests.report.gradcheck.made_up_checks import BAD, GOOD, RULE, STEPS


def to_json(result: Gradcheck) -> str:
    return export.to_json(result, [rerun_command(result, failure) for failure in result.failures])


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
    plain = json.loads(to_json(result), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain.pop("format_version") == 1
    assert plain.pop("passed") is (result is GOOD)
    assert from_plain(Gradcheck, facts(plain)) == result


def test_json_says_beside_the_fields_what_the_terminal_shows() -> None:
    plain = json.loads(to_json(BAD))
    assert plain["groups"][0]["tolerance"] == TOLERANCES[RULE]
    assert plain["groups"][0]["not_checked"] is None
    assert plain["failures"][0]["case"] == "train-float32-4x3x5x5-relu-dx"
    assert plain["failures"][0]["message"] == "dx[0, 1, 2, 2] is 0.75; expected 0.25; relative error 0.5"
    assert plain["failures"][0]["reproduce"].endswith("--allow-code --only train-float32-4x3x5x5-relu-dx")
    assert plain["diagnoses"][0]["evidence"] == evidence_text(BAD.diagnoses[0])
    assert json.loads(to_json(GOOD))["groups"][3]["not_checked"] == "Metal has no float64"


def test_json_of_the_demonstration_and_of_an_interrupted_check_has_a_version_too() -> None:
    demo = json.loads(export.demo_to_json(STEPS))
    assert demo["format_version"] == 1
    assert [from_plain(BiasStep, step) for step in demo["steps"]] == list(STEPS)
    part = json.loads(export.interrupted_to_json(BAD.groups))
    assert part["format_version"] == 1
    assert part["interrupted"] is True
    assert [from_plain(CheckGroup, group) for group in facts(part)["groups"]] == list(BAD.groups)
