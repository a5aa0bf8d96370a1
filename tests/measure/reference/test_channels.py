"""Large cases: the kernel runs on all channels, and some of them are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.reference import channels
from bncli.measure.reference.candidate import by_name
from bncli.measure.reference.case import timed
from bncli.measure.reference.channels import large
from bncli.measure.timing import clock
from bncli.results.profile import Case

CPU = torch.device("cpu")
NATIVE = by_name("native")


def test_native_is_right_however_many_threads_and_channels_it_adds_over() -> None:
    """In channels_last torch's sums over 25,088 values err twice as much on two threads as on one."""
    case = timed(Case((32, 32, 28, 28), "bn", "fp32", "channels_last"))
    with clock.threads(2):
        assert not large(case, CPU).judge(NATIVE, "native").wrong


def test_where_native_finds_no_room_for_all_channels_others_are_judged_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    case = timed(Case((2, 5, 512, 128), "bn", "fp32"))

    def no_room(x: Tensor, *others: Any) -> Tensor:
        if x.shape == case.shape:
            raise torch.OutOfMemoryError
        return NATIVE(x, *others)

    with monkeypatch.context() as patched:
        patched.setattr(channels, "native_in_the_same_dtype", lambda: no_room)
        found = large(case, CPU)
    assert set(found.native) == {"forward", "running_mean", "running_var", "dx", "dweight", "dbias"}
    assert not found.judge(NATIVE, "own function").wrong
