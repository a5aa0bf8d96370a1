"""Shared by the tests of profiles."""

from __future__ import annotations

import pytest

from bncli.kernels import fused, native


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel, played by the native one."""
    monkeypatch.setattr(fused, "batch_norm", native.batch_norm)
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)
