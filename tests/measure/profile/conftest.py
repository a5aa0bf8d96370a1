"""Shared by the tests of profiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bncli.engine.load import CoreWait
from bncli.kernels import fused, native


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel, played by the native one."""
    monkeypatch.setattr(fused, "batch_norm", native.batch_norm)
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: None)


@pytest.fixture(scope="module", autouse=True)
def idle_cores() -> Iterator[None]:
    """Cores that no other program uses, whatever runs here meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoreWait, "cores", lambda self: 0.0)
        yield
