"""Folders of results: nothing half written, nothing lost, nothing shared by two writers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bncli.errors import BncliError, RecipeError
from bncli.report.folder import ComparisonFolder, RunFolder, load_comparison
from bncli.results import Evaluated, Evaluation, RunRecord


def record(make_result, key: str, failure: str | None = None) -> RunRecord:
    return RunRecord(key, "plain", {}, 0, "report", None if failure else make_result(100.0), failure)


def test_records_come_back_by_key_and_failures_are_tried_again(tmp_path: Path, make_result) -> None:
    with ComparisonFolder(tmp_path / "runs") as folder:
        folder.save(record(make_result, "good"))
        folder.save(record(make_result, "bad", "it died"))
    with ComparisonFolder(tmp_path / "runs") as folder:
        assert set(folder.finished()) == {"good"}
        assert not list((tmp_path / "runs/failed").iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 99}', b"\xff\x00"])
def test_a_run_whose_file_cannot_be_read_is_done_again(tmp_path: Path, make_result, content: bytes) -> None:
    with ComparisonFolder(tmp_path) as folder:
        folder.save(record(make_result, "good"))
        (tmp_path / "runs/damaged.json").write_bytes(content)
        assert set(folder.finished()) == {"good"}


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    with ComparisonFolder(tmp_path), pytest.raises(BncliError, match="another comparison is writing here"):
        ComparisonFolder(tmp_path).__enter__()
    with ComparisonFolder(tmp_path):
        pass


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "name") as folder:
        folder.begin("train: {}\n")
        folder.metrics(Evaluated(Evaluation(0, 0.1, float("nan"), None), 0.5))
        line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (line["event"], line["step"], line["loss"]) == ("evaluated", 0, "NaN")
    assert (tmp_path / "run/recipe.yaml").read_text() == "train: {}\n"


def test_each_run_without_a_name_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        with RunFolder(None, "small") as folder:
            folder.begin("")
            paths.append(folder.path)
    assert len(set(paths)) == 3
    assert all(str(path).startswith("runs/small/") for path in paths)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"--out .*file/run: cannot be made: Not a directory"):
        RunFolder(tmp_path / "file/run", "name").begin("")


def test_a_folder_without_a_comparison_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"comparison.json cannot be read: No such file or directory; give a JSON file"
    ):
        load_comparison(tmp_path)
