"""The implementations of the fused kernel that can run here."""

from __future__ import annotations

import pytest
import torch

from bncli import kernels
from bncli.errors import Unavailable
from tests.kernels.fused.checks import UnderTest

IMPLEMENTATIONS = [
    pytest.param(("fused", "cpu"), id="C"),
    pytest.param(("fused-interpreted", "cpu"), id="interpreter"),
    pytest.param(("fused", "cuda"), id="GPU", marks=pytest.mark.cuda),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernel(request: pytest.FixtureRequest) -> UnderTest:
    """Each implementation of the fused kernel. One that cannot run here is skipped with its reason."""
    name, device = request.param[0], torch.device(request.param[1])
    if name == "fused-interpreted" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process")
    try:
        return UnderTest(name, device, kernels.get(name, device))
    except Unavailable as error:
        pytest.skip(str(error))
