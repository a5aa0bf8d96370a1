"""Report of a comparison with a baseline: verdicts, rows of one side, and the last line."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bncli.report.profile.baseline import GateReport, closing, to_junit
from bncli.results.profile import Gate, Profile
from tests.report.conftest import Show
from tests.report.made_up_costs import failed, made_gate, one_case


@pytest.mark.parametrize(("width", "speedups"), [(60, 0), (80, 2), (100, 2), (160, 2)])
def test_each_change_has_its_slowdown_and_verdict_in_words(width: int, speedups: int, show: Show) -> None:
    text = show(GateReport(made_gate()), width)
    rows = [line.split() for line in text.splitlines() if line.startswith("256x64x56x56, ")]
    assert [" ".join(row[-2:]).rpartition(") ")[2] for row in rows] == ["ok", "regressed", "cannot tell", "ok"]
    for row, slowdown in zip(rows, ("1.00x", "1.36x", "1.10x", "0.924x"), strict=True):
        assert slowdown in row
        assert sum(word.endswith("x") for word in row) == speedups + 1
        assert ("2.31x" in row) == bool(speedups)


def test_the_last_line_counts_the_verdicts_and_tells_the_exit_code(show: Show) -> None:
    failed = "2 ok, 1 regressed, 1 cannot tell: FAILED, the whole interval of a slowdown is above 1.1x (exit 1)."
    assert " ".join(show(GateReport(made_gate()), 80).split()).endswith(failed)
    calm = replace(made_gate(), changes=tuple(each for each in made_gate().changes if each.verdict != "regressed"))
    disturbed = replace(calm, disturbed=("this run", "the baseline"))
    for gate, words in (
        (calm, "2 ok, 1 cannot tell: passed (exit 0). Undecided rows fail a strict comparison only. For narrower"),
        (
            replace(calm, strict=True),
            "2 ok, 1 cannot tell: FAILED, 2 of the baseline's rows are undecided (strict, exit 1).",
        ),
        (
            disturbed,
            "Other programs used the cores in this run and in the baseline: no row measured then is called regressed, "
            "measure it again. 2 ok, 1 cannot tell: passed (exit 0).",
        ),
        (replace(calm, changes=calm.changes[:1]), "1 ok: passed (exit 0)."),
    ):
        assert closing(gate).startswith(words)


def test_junit_has_a_test_for_each_row_by_its_verdict() -> None:
    profile = one_case()

    def outcomes(gate: Gate, result: Profile = profile) -> list[tuple[str | None, str | None, str]]:
        (suite,) = ElementTree.fromstring(to_junit(result, gate))
        return [(case.get("classname"), case.get("name"), case[0].tag) for case in suite]

    usual, strict = outcomes(made_gate()), outcomes(replace(made_gate(), strict=True))
    assert usual[0][:2] == (f"bncli.profile.{made_gate().changes[0].row.words[0]}", usual[0][1])
    assert [tag for _, _, tag in usual] == ["system-out", "failure", "system-out", "system-out", "system-out"]
    assert [tag for _, _, tag in strict] == ["system-out", "failure", "failure", "system-out", "failure"]
    (suite,) = ElementTree.fromstring(to_junit(one_case(), made_gate()))
    assert str(suite[1][0].get("message")).startswith("regressed: 1.36x (")
    assert str(suite[2][0].text).startswith("cannot tell: ")
    wrong = failed(one_case().rows[0].case, "fused", "wrong result", wrong=True)
    assert outcomes(made_gate(), replace(one_case(), rows=(wrong,)))[-1][2] == "error"


def test_what_only_one_side_has_is_listed(show: Show) -> None:
    lines = show(GateReport(made_gate()), 100).splitlines()
    assert lines[lines.index("Not in the baseline:") + 1] == "- bn fp32 contiguous, 60x100, fused"
    assert lines[lines.index("In the baseline, but without a speedup now:") + 1] == "- bn fp32 contiguous, 8x8, fused"


def test_another_device_and_another_cache_are_noted(show: Show) -> None:
    there = replace(one_case(), cold=False, environment=replace(one_case().environment, device="cuda:0 NVIDIA X"))
    text = show(GateReport(made_gate(), one_case(), there), 160)
    assert "Different device: cpu now, cuda:0 NVIDIA X in the baseline" in text
    assert "Different cache: cold now, warm in the baseline" in text
    assert "Different" not in show(GateReport(made_gate(), one_case(), one_case()), 160)
