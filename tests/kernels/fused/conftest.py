"""The implementations of the fused kernel that can run here, and memory that shows what they leave unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels.fused import build, cpu
from tests.kernels.fused.checks import UnderTest

IMPLEMENTATIONS = [
    pytest.param(("fused", "cpu"), id="C"),
    pytest.param(("fused", "cpu"), id="C with node", marks=pytest.mark.slow),
    pytest.param(("fused-interpreted", "cpu"), id="interpreter"),
    pytest.param(("fused", "cuda"), id="GPU", marks=pytest.mark.cuda),
]


@pytest.fixture(scope="session")
def node() -> Any:
    """The function of node.cpp, compiled unless it is cached. Skipped where there is no compiler."""
    try:
        build.node(or_compile=True)
    except Unavailable as error:
        pytest.skip(str(error))
    cpu.node.cache_clear()
    return cpu.node()


@pytest.fixture(params=IMPLEMENTATIONS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> UnderTest:
    """Each implementation of the fused kernel. One that cannot run here is skipped with its reason."""
    found = request.getfixturevalue("node") if "node" in request.node.callspec.id else None
    monkeypatch.setattr(cpu, "node", lambda: found)
    name, device = request.param[0], torch.device(request.param[1])
    if name == "fused-interpreted" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process")
    try:
        return UnderTest(name, device, kernels.get(name, device))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def device() -> torch.device:
    """The device on which the kernel in Triton can run here: a GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Memory that torch.empty gives holds NaN, so that an element that a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    switches.fill_uninitialized_memory = True
    yield
    switches.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
