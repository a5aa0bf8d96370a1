"""Shared by the tests of profiles."""

from __future__ import annotations

import pytest

from bncli import kernels
from bncli.kernels import native


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel, played by the native one."""
    monkeypatch.setitem(kernels.KERNELS, "fused", native.batch_norm)
    monkeypatch.setitem(kernels._WHY_NOT, "fused", lambda device: None)
