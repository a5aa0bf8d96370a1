"""A profile as JSON that gives it back, as CSV with all digits, as Markdown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bncli.errors import USAGE, UsageError
from bncli.report.profile.export import load, to_csv, to_json, to_markdown
from bncli.results.environment import Environment, Interval
from bncli.results.profile import (
    STEP_CLASSES,
    Case,
    Ceilings,
    KernelCost,
    KernelProfile,
    NormLayers,
    NormRemark,
    Note,
    Speedup,
    StepCost,
    StepMemory,
    StepProfile,
    Times,
)
from tests.report.made_up_costs import (
    ENVIRONMENT,
    KERNELS,
    kernel_profile,
    made_gate,
    nothing_measured,
    one_case,
    step_profile,
    with_errors,
)

PROFILES = {**KERNELS, "step": step_profile}


@pytest.mark.parametrize("name", PROFILES)
def test_the_json_gives_the_same_profile_back(name, tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(to_json(PROFILES[name]()))
    assert load(file) == PROFILES[name]()


POSITIVE = st.floats(1e-9, 1e12)
MAYBE = st.none() | POSITIVE
FASTER = st.none() | st.builds(Speedup, POSITIVE, st.builds(Interval, MAYBE, MAYBE))
SAMPLES = st.lists(POSITIVE, max_size=4).map(tuple)
TIMES = st.none() | st.builds(Times, SAMPLES, POSITIVE, POSITIVE)
CASES = st.builds(
    Case,
    shape=st.lists(st.integers(1, 10**6), min_size=2, max_size=5).map(tuple),
    operation=st.sampled_from(["bn", "bn+relu", "bn+add+relu"]),
    dtype=st.sampled_from(["bf16", "fp16", "fp32", "fp64"]),
    training=st.booleans(),
)
ROWS = st.builds(
    KernelCost, case=CASES, kernel=st.text(max_size=8), calls=st.integers(0, 99), ran=st.none() | st.text(max_size=8),
    forward=TIMES, backward=TIMES, both=TIMES, faster=FASTER, peak_memory_mib=MAYBE, saved_mib=MAYBE,
    error=st.none() | st.text(max_size=20), wrong=st.booleans(),
)  # fmt: skip
COPIES = st.lists(st.tuples(st.integers(1, 2**40), POSITIVE), min_size=1, max_size=3).map(tuple)
KERNEL_NOTES = st.builds(
    Note,
    st.sampled_from(["channels sampled", "few rounds", "host bound"]),
    cases=st.lists(CASES, max_size=3).map(tuple),
    count=st.integers(0, 99),
    of=st.integers(0, 99),
)
KERNEL_PROFILES = st.builds(
    KernelProfile,
    environment=st.builds(Environment, *[st.text(max_size=5)] * 6, st.none() | st.text(max_size=5), st.integers(1, 99),
                          st.text(max_size=5)),
    cold=st.booleans(), seconds=POSITIVE, planned=st.integers(0, 99), means=st.just(()),
    ceilings=st.builds(Ceilings, COPIES, MAYBE),
    rows=st.lists(ROWS, max_size=3).map(tuple), notes=st.lists(KERNEL_NOTES, max_size=2).map(tuple),
)  # fmt: skip
NORMS = st.builds(
    NormLayers,
    st.sampled_from(["batch norm", "LayerNorm"]),
    st.integers(1, 99),
    st.sampled_from(["native", "fused"]),
    st.booleans(),
    st.sampled_from([(), ((),), (("relu",), ("residual add", "relu"))]),
)
REMARKS = st.builds(
    NormRemark,
    st.text(max_size=8),
    st.just("long half-life"),
    st.text(max_size=8),
    st.integers(0, 9),
    st.just({"momentum": 0.0, "half_life_steps": float("inf")}),
)
STEP_NOTES = st.builds(Note, st.just("memory unknown"), arm=st.text(max_size=9), reason=st.text(max_size=9))
STEP_ROWS = st.builds(
    StepCost, arm=st.text(max_size=8), kernel=st.none() | st.text(max_size=8), batch_size=st.integers(1, 10**6),
    mode=st.sampled_from(["training", "evaluation"]), samples_ms=SAMPLES, faster=FASTER,
    shares_ms=st.dictionaries(st.sampled_from(STEP_CLASSES), POSITIVE), norms=st.lists(NORMS, max_size=2).map(tuple),
    memory=st.none() | st.builds(StepMemory, *[POSITIVE] * 4, MAYBE), error=st.none() | st.text(max_size=8),
)  # fmt: skip
STEP_PROFILES = st.builds(
    StepProfile, name=st.text(max_size=8), environment=st.just(ENVIRONMENT), seconds=POSITIVE,
    rows=st.lists(STEP_ROWS, max_size=3).map(tuple), remarks=st.lists(REMARKS, max_size=2).map(tuple),
    planned=st.integers(0, 99), notes=st.lists(STEP_NOTES, max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(profile=KERNEL_PROFILES | STEP_PROFILES)
def test_any_profile_comes_back_from_its_json_and_has_a_csv_line_a_row(profile, tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(to_json(profile), encoding="utf-8")
    assert load(file) == profile
    assert len(list(csv.reader(io.StringIO(to_csv(profile))))) == 1 + len(profile.rows)
    assert to_markdown(profile).startswith("### ")


def test_the_json_says_which_view_it_is_and_holds_the_gate(tmp_path):
    plain = json.loads(to_json(kernel_profile(), made_gate()))
    assert (plain["kind"], plain["format_version"]) == ("kernels", 2)
    assert plain["gate"]["regressed"] is True
    change = plain["gate"]["changes"][1]
    assert change["name"] == "bn+relu fp32 contiguous, 256x64x56x56, compiled"
    assert (change["row"]["kernel"], change["row"]["case"]["layout"]) == ("compiled", "contiguous")
    assert plain["gate"]["only_now"] == ["bn fp32 contiguous, 60x100, fused"]
    assert json.loads(to_json(step_profile()))["kind"] == "step"
    file = tmp_path / "gated.json"
    file.write_text(to_json(kernel_profile(), made_gate()))
    assert load(file) == kernel_profile()  # the gate of then is no part of the baseline of now


def changed(**fields) -> str:
    return json.dumps(json.loads(to_json(one_case())) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is JSON, but no profile"),
        ('{"kind": ["kernels"], "format_version": 2}', "is JSON, but no profile"),
        ('{"format_version": 2, "plan": {}}', "is JSON, but no profile"),
        (changed(kind="speed"), "is JSON, but no profile"),
        (changed(format_version=3), "format_version is 3 and this bncli reads 2; update bncli"),
        (changed(format_version=0), "measure it anew"),
        (changed(format_version="one"), "measure it anew"),
        (changed(rows=3), "rows: expected a list, found 3"),
        (changed(rows=3, format_version=1), "rows: expected a list, found 3"),
        (changed(notes=["a sentence"]), "notes[0]: expected an object"),
        (changed(colour="red"), "colour is no field of it"),
        (to_json(one_case()).replace('"value": 2.31', '"value": 0.0'), "no positive number"),
        (to_json(one_case()).replace('"value": 2.31', '"value": "NaN"'), "no positive number"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_its_name_and_what_to_do(text, message, tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        load(file)
    assert refused.value.exit_code == USAGE
    assert str(refused.value).startswith(f"baseline {file}: ")
    assert message in str(refused.value)
    assert ";" in str(refused.value)


def test_a_profile_of_version_1_whose_notes_were_sentences_still_serves_as_a_baseline(tmp_path):
    file = tmp_path / "old.json"
    for profile in (kernel_profile(), step_profile()):
        plain = json.loads(to_json(profile)) | {"format_version": 1, "notes": ["apex: is not installed"]}
        for row in plain["rows"] if plain["kind"] == "step" else ():
            row["norms"] = "19 batch norms (19 with relu)"
        if plain["kind"] == "step":
            plain["remarks"] = [{"arm": "plain", "layer": "norm", "finding": "a bias", "advice": "set bias=False"}]
        file.write_text(json.dumps(plain))
        assert [(row.key, row.faster) for row in load(file).rows] == [(row.key, row.faster) for row in profile.rows]


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, why in (("missing.json", "No such file"), (".", "directory"), ("binary", "it is not text")):
        with pytest.raises(UsageError, match=why):
            load(Path(tmp_path / name))


def test_the_csv_has_all_digits_and_an_empty_cell_for_an_unknown():
    rows = list(csv.DictReader(io.StringIO(to_csv(with_errors()))))
    profile = with_errors()
    assert len(rows) == len(profile.rows)
    fused = next(row for row in rows if row["kernel"] == "fused")
    made = next(row for row in profile.rows if row.kernel == "fused")
    assert float(fused["both_ms"]) == sorted(made.both.samples_ms)[len(made.both.samples_ms) // 2]
    assert (fused["shape"], fused["times_native"]) == ("256x64x56x56", "2.31")
    wrong = next(row for row in rows if row["kernel"] == "mine:norm")
    assert (wrong["both_ms"], wrong["wrong"], wrong["peak_memory_mib"]) == ("", "True", "")
    assert wrong["error"].startswith("dx is wrong")


def test_the_csv_of_a_step_has_a_column_a_class_and_a_part_of_memory():
    rows = list(csv.DictReader(io.StringIO(to_csv(step_profile()))))
    assert len(rows) == 6
    for column in (
        "normalization_ms",
        "convolution_linear_ms",
        "gaps_ms",
        "activations_mib",
        "peak_mib",
        "samples_per_s",
    ):
        assert rows[0][column]
    assert rows[2]["peak_mib"] == ""  # evaluation


def test_the_csv_of_nothing_is_a_header():
    assert len(to_csv(nothing_measured()).splitlines()) == 1


@pytest.mark.parametrize("name", PROFILES)
def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(name):
    tables = [block for block in to_markdown(PROFILES[name](), made_gate()).split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        cells = [line.replace("\\|", "").count("|") for line in table.strip().splitlines()]
        assert len(set(cells)) == 1


def test_markdown_has_a_heading_a_group_and_the_error_in_its_row():
    text = to_markdown(with_errors())
    assert "#### bn+relu, fp32, contiguous" in text
    (line,) = [line for line in text.splitlines() if "mine:norm" in line and line.startswith("|")]
    assert "dx is wrong" in line
    assert "Measured ceilings" in text
