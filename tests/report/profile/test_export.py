"""A profile as JSON that gives it back, as CSV with all digits, as Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bncli.errors import USAGE, UsageError
from bncli.report.profile.export import load, to_csv, to_json, to_latex, to_markdown
from bncli.results.finding import Finding
from bncli.results.profile import KernelProfile, NormRemark, Note, Profile, StepProfile
from tests.report.conftest import check_latex
from tests.report.made_up_costs import (
    KERNELS,
    kernel_profile,
    made_gate,
    nothing_measured,
    one_case,
    step_profile,
    with_errors,
)

PROFILES = {**{name: make() for name, make in KERNELS.items()}, "step": step_profile()}


@pytest.mark.parametrize("name", PROFILES)
def test_the_json_gives_the_same_profile_back(name: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(to_json(PROFILES[name]))
    assert load(tmp_path / "profile.json") == PROFILES[name]


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a result's type, all of its fields drawn; numbers are positive and finite."""
    if hint in DRAWN:
        return DRAWN[hint]
    origin, parts = get_origin(hint), [values_of(part) for part in get_args(hint) if get_origin(hint) is not Literal]
    if is_dataclass(hint):
        fields = {name: values_of(part) for name, part in get_type_hints(hint).items() if name != "format_version"}
        return st.builds(hint, **fields)
    if origin is Literal:
        return st.sampled_from(get_args(hint))
    if origin is tuple:
        return st.lists(parts[0], max_size=3).map(tuple) if get_args(hint)[-1] is ... else st.tuples(*parts)
    return st.dictionaries(*parts, max_size=3) if origin is dict else st.one_of(parts)


DRAWN: dict[Any, st.SearchStrategy[Any]] = {
    ...: st.nothing(),
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(0, 10**6),
    float: st.floats(1e-9, 1e12),
    str: st.text(max_size=8),
    # Words need the fields of their kind.
    Note: st.sampled_from([*kernel_profile().notes, *step_profile().notes, Note("few rounds", count=6)]),
    NormRemark: st.just(NormRemark("arm", "long half-life", "1", 2, {"momentum": 0.0, "half_life_steps": math.inf})),
    Finding: st.just(Finding("off", "dx", 7.0, at=(0, 1), found=1.5, expected=2.0)),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profile=values_of(KernelProfile) | values_of(StepProfile))
def test_any_profile_comes_back_from_its_json_and_has_a_csv_line_a_row(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(to_json(profile), encoding="utf-8")
    assert load(file) == profile
    assert len(list(csv.reader(io.StringIO(to_csv(profile))))) == 1 + len(profile.rows)
    assert to_markdown(profile).startswith("### ")


def test_the_json_says_which_view_it_is_and_holds_the_comparison(tmp_path: Path) -> None:
    file = tmp_path / "compared.json"
    file.write_text(to_json(kernel_profile(), made_gate()))
    plain = json.loads(file.read_text())
    assert (plain["kind"], plain["format_version"]) == ("kernels", 2)
    assert plain["gate"]["regressed"] is True
    change = plain["gate"]["changes"][1]
    assert change["name"] == "bn+relu fp32 contiguous, 256x64x56x56, compiled"
    assert (change["row"]["kernel"], change["row"]["case"]["layout"]) == ("compiled", "contiguous")
    assert plain["gate"]["only_now"] == ["bn fp32 contiguous, 60x100, fused"]
    assert load(file) == kernel_profile()  # an earlier comparison is no part of a baseline
    assert json.loads(to_json(step_profile()))["kind"] == "step"


@pytest.mark.parametrize("profile", [kernel_profile(), step_profile()], ids=["kernels", "step"])
def test_the_json_has_median_and_quartiles_beside_the_samples(profile: Profile) -> None:
    row, found = profile.rows[0], json.loads(to_json(profile))["rows"][0]
    if isinstance(profile, KernelProfile):
        row, found = row.both, found["both"]
    assert found["samples_ms"] == list(row.samples_ms)
    low, middle, high = statistics.quantiles(row.samples_ms, n=4, method="inclusive")
    assert (found["lower_quartile_ms"], found["median_ms"], found["upper_quartile_ms"]) == (low, middle, high)
    unmeasured = json.loads(to_json(with_errors()))["rows"][3]
    assert unmeasured["both"] is None
    assert "median_ms" not in unmeasured


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(to_json(one_case())) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is JSON, but not a profile"),
        ('{"kind": ["kernels"], "format_version": 2}', "is JSON, but not a profile"),
        ('{"format_version": 2, "plan": {}}', "is JSON, but not a profile"),
        (changed(kind="speed"), "is JSON, but not a profile"),
        (changed(format_version=3), "format_version is 3 and this bncli reads 1 and 2; update bncli"),
        (changed(format_version=0), "create it again"),
        (changed(format_version="one"), "create it again"),
        (changed(rows=3), "rows: expected a list, found 3"),
        (changed(rows=3, format_version=1), "rows: expected a list, found 3"),
        (changed(notes=["a sentence"]), "notes[0]: expected an object"),
        (changed(colour="red"), "colour is not a known field"),
        (to_json(one_case()).replace('"value": 2.31', '"value": 0.0'), "no positive number"),
        (to_json(one_case()).replace('"value": 2.31', '"value": "NaN"'), "no positive number"),
        (b"\xff\xfe\x00", "it is not text"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_what_to_do(
    text: str | bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as refused:
        load(file)
    assert refused.value.exit_code == USAGE
    assert str(refused.value).startswith(f"baseline {file}: ")
    assert message in str(refused.value)
    assert ";" in str(refused.value)


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        load(tmp_path)


@pytest.mark.parametrize("profile", [kernel_profile(), step_profile()], ids=["kernels", "step"])
def test_version_1_with_sentences_for_notes_still_serves_as_a_baseline(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    plain = json.loads(to_json(profile)) | {"format_version": 1, "notes": ["apex: is not installed"]}
    for row in plain["rows"]:
        del row["cores_lacked"]
        if row["faster"]:
            del row["faster"]["of_medians"]
    if plain["kind"] == "step":
        plain["remarks"] = [{"arm": "plain", "layer": "norm", "finding": "a bias", "advice": "set bias=False"}]
        for row in plain["rows"]:
            row["norms"] = "19 batch norms (19 with relu)"
    file.write_text(json.dumps(plain))
    assert [(row.key, row.faster) for row in load(file).rows] == [(row.key, row.faster) for row in profile.rows]


# --- CSV ----------------------------------------------------------------------------------------------------------


def test_the_csv_has_all_digits_and_an_empty_cell_for_an_unknown() -> None:
    profile = with_errors()
    rows = list(csv.DictReader(io.StringIO(to_csv(profile))))
    assert len(rows) == len(profile.rows)
    fused = next(row for row in rows if row["kernel"] == "fused")
    made = next(row for row in profile.rows if row.kernel == "fused")
    assert made.both
    assert float(fused["both_ms"]) == sorted(made.both.samples_ms)[len(made.both.samples_ms) // 2]
    assert (fused["shape"], fused["times_native"]) == ("256x64x56x56", "2.31")
    wrong = next(row for row in rows if row["kernel"] == "mine:norm")
    assert (wrong["both_ms"], wrong["wrong"], wrong["peak_memory_mib"]) == ("", "True", "")
    assert wrong["error"].startswith("dx is wrong")


def test_the_csv_of_a_step_has_a_column_a_class_and_a_part_of_memory() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(step_profile()))))
    assert len(rows) == 6
    shares = ("normalization_ms", "convolution_linear_ms", "gaps_ms")
    assert all(rows[0][column] for column in (*shares, "activations_mib", "peak_mib", "samples_per_s"))
    assert rows[2]["peak_mib"] == ""  # evaluation


def test_the_csv_of_nothing_is_a_header() -> None:
    assert len(to_csv(nothing_measured()).splitlines()) == 1


# --- Markdown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(name: str) -> None:
    tables = [block for block in to_markdown(PROFILES[name], made_gate()).split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.strip().splitlines()}) == 1
        assert "((" not in table


def test_markdown_has_a_heading_a_group_and_the_error_in_its_row() -> None:
    text = to_markdown(with_errors())
    assert "#### bn+relu, fp32, contiguous" in text
    (line,) = [line for line in text.splitlines() if "mine:norm" in line and line.startswith("|")]
    assert "dx is wrong" in line
    assert "Measured ceilings" in text


@pytest.mark.parametrize("name", PROFILES)
def test_the_latex_tables_are_those_of_markdown(name: str) -> None:
    text = to_latex(PROFILES[name])
    headings = [line for line in to_markdown(PROFILES[name]).splitlines() if line.startswith("####")]
    assert text.count(r"\begin{tabular}") == len(headings)
    if headings:
        check_latex(text)
