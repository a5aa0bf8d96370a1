"""What all commands share: messages, the form of the result, and signals."""

from __future__ import annotations

import pytest

from tests.cli.conftest import bncli


def test_several_mistakes_are_counted_and_listed(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bncli(monkeypatch, "train", recipe, "--set", "train.steps=0", "--set", "nrom=batch") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bncli: 2 mistakes"
    assert len(lines) == 3
