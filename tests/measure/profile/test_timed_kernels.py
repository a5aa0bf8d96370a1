"""Kernels that are judged before they are timed: right ones, wrong ones, and those that are not there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.measure.profile.timed_kernels import Source, TimedKernel
from bncli.measure.reference import case as cases
from bncli.measure.reference.case import EPS
from bncli.results.profile import Note, RowDone
from tests.measure.profile.fake_machine import NATIVE, OVERHEAD_MS, SMALL, Machine, profile, row_of, run_of

Spoil = Callable[[tuple[Any, ...], Tensor], Tensor]


def broken(spoil: Spoil) -> Source:
    """Native's kernel, whose result is spoilt on the cases that are timed."""

    def source(case: cases.Case) -> TimedKernel:
        if case.eps != EPS:
            return TimedKernel(case, NATIVE)
        return TimedKernel(case, lambda *given: spoil(given, NATIVE(*given)), "broken")

    return source


def in_the_gradient(given: tuple[Any, ...], y: Tensor) -> Tensor:
    y.register_hook(lambda dy: dy * 1.01)
    return y


def in_the_last_channel(given: tuple[Any, ...], y: Tensor) -> Tensor:
    return torch.cat([y[:, :-1], y[:, -1:] * 1.01], dim=1)


def in_one_element(given: tuple[Any, ...], y: Tensor) -> Tensor:
    hole = torch.zeros_like(y)
    hole[1, 1, 0, 0] = float("nan")
    return y + hole


def in_running_var(given: tuple[Any, ...], y: Tensor) -> Tensor:
    given[2].data.mul_(1.01)
    return y


def without_the_last_element(given: tuple[Any, ...], y: Tensor) -> Tensor:
    """A tail that is never written, as a wrong mask leaves it."""
    keep = torch.ones_like(y, dtype=torch.bool)
    keep.view(-1)[-1] = False
    return torch.where(keep, y, torch.empty_like(y).detach())


def into_x(given: tuple[Any, ...], y: Tensor) -> Tensor:
    given[0].data[-1, -1].mul_(2)
    return y


WRONG: dict[str, tuple[Spoil, str, str]] = {  # the kind of the finding and its quantity, empty for the call as a whole
    "y": (lambda given, y: y * 1.01, "off", "forward"),
    "dx": (in_the_gradient, "off", "dx"),
    "a channel": (in_the_last_channel, "off", "forward"),
    "an element": (in_one_element, "nan_unexpected", "forward"),
    "running_var": (in_running_var, "off", "running_var"),
    "a tail": (without_the_last_element, "nan_unexpected", "forward"),
    "dtype": (lambda given, y: y.double(), "wrong_dtype", ""),
    "shape": (lambda given, y: y.flatten(2), "wrong_shape", ""),
    "x": (into_x, "input_written", ""),
}


def test_a_wrong_kernel_has_its_finding_and_no_time() -> None:
    machine = Machine()
    sources = {name: broken(spoil) for name, (spoil, _, _) in WRONG.items()}
    found = profile(machine, {"native": machine.takes(1.0, 1.0), **sources})
    assert row_of(found, "native").both is not None
    for name, (_, kind, quantity) in WRONG.items():
        row = row_of(found, name)
        assert (row.wrong, row.error, row.wrong_case) == (True, "wrong result", None)
        assert row.finding is not None
        assert (row.finding.kind, row.finding.quantity) == (kind, quantity)
        assert (row.forward, row.backward, row.both, row.faster, row.saved_mib) == (None,) * 5


def test_a_kernel_that_is_wrong_on_a_small_case_is_judged_there_once() -> None:
    machine = Machine()
    made: list[cases.Case] = []

    def wrong_in_half_precision(case: cases.Case) -> TimedKernel:
        made.append(case)
        call: Any = (lambda *given: NATIVE(*given) * 1.25) if case.dtype == "float16" else NATIVE
        return TimedKernel(case, call)

    shapes = (SMALL, ((2, 9), 1))
    found = profile(machine, {"native": machine.takes(1.0, 1.0), "mine": wrong_in_half_precision}, shapes=shapes)
    rows = [row for row in found.rows if row.kernel == "mine"]
    assert len(rows) == 2
    for row in rows:
        assert (row.wrong, row.both) == (True, None)
        assert row.wrong_case is not None
        assert row.wrong_case.startswith("train/float16/")
        assert row.finding is not None
        assert row.finding.quantity == "forward"
    counts = [made.count(case) for case in made if case.dtype == "float16"]
    assert max(counts) <= 2  # its forward pass, and all of it
    assert not any(case.shape == (2, 9) for case in made)


def test_what_a_kernel_refuses_in_a_small_case_is_no_wrong_result() -> None:
    machine = Machine()

    def picky(case: cases.Case) -> TimedKernel:
        def call(*given: Any) -> Tensor:
            if case.stored == torch.bfloat16:
                raise TypeError("no bfloat16")
            if case.activation == "silu":
                raise NotImplementedError("no silu")
            return NATIVE(*given)

        if case.mode == "eval":
            raise Unavailable("training alone")
        return TimedKernel(case, call)

    found = profile(machine, {"native": machine.takes(1.0, 1.0), "mine": picky})
    assert row_of(found, "mine").error is None
    assert row_of(found, "mine").judged_on_cases


def test_a_large_case_is_judged_from_the_first_channel_to_the_last() -> None:
    machine = Machine()
    large = ((2, 5, 512, 128), 1)  # 131,072 values a channel: three channels are judged
    sources = {"native": machine.takes(1.0, 1.0), "last": broken(in_the_last_channel), "one": broken(in_one_element)}
    found = profile(machine, sources, shapes=(large,))
    assert [row.wrong for row in found.rows] == [False, True, True]
    assert [note.kind for note in found.notes if note.cases] == ["channels sampled"]


def refuses(*given: Any) -> Tensor:
    raise ValueError("of mine\nin detail")


def test_a_kernel_that_is_missing_or_raises_leaves_the_other_rows() -> None:
    machine = Machine()

    def missing(case: cases.Case) -> TimedKernel:
        raise Unavailable("not installed (pip install rival)")

    def right_at_first(case: cases.Case) -> TimedKernel:
        calls = itertools.count()

        def call(*given: Any) -> Tensor:
            if next(calls) >= 2:  # it is judged, and what it saves is counted
                raise RuntimeError("tired")
            return NATIVE(*given)

        return TimedKernel(case, call)

    sources = {"missing": missing, "raises": lambda case: TimedKernel(case, refuses), "right at first": right_at_first}
    found = profile(machine, {**sources, "native": machine.takes(1.0, 1.0)})
    rows = {name: row_of(found, name) for name in sources}
    assert {name: (row.error, row.both) for name, row in rows.items()} == {
        "missing": ("not installed (pip install rival)", None),
        "raises": ("ValueError: of mine", None),
        "right at first": ("RuntimeError: tired", None),
    }
    assert [row.wrong for row in rows.values()] == [False, True, True]
    assert row_of(found, "native").both is not None


def test_a_failed_compilation_says_why_and_a_successful_one_is_in_no_row() -> None:
    machine = Machine()

    def compiles(case: cases.Case) -> TimedKernel:
        calls = itertools.count()

        def call(*given: Any) -> Tensor:
            machine.passed_ns += 0 if next(calls) else 7_000_000_000
            return NATIVE(*given)

        return TimedKernel(case, call, compiles=True)

    bad: Source = lambda case: TimedKernel(case, refuses, compiles=True)  # noqa: E731
    found = profile(machine, {"native": machine.takes(1.0, 1.0), "bad": bad, "good": compiles})
    assert (row_of(found, "bad").error, row_of(found, "bad").wrong) == ("torch.compile: ValueError: of mine", False)
    good = row_of(found, "good")
    assert good.both is not None
    assert not good.judged_on_cases
    assert max(good.both.samples_ms) == pytest.approx(OVERHEAD_MS)
    assert good.peak_memory_mib is None
    assert Note("compilation", "good", seconds=7.0) in found.notes
    assert Note("peak needs compilation", "good") in found.notes


def test_a_kernel_is_compiled_however_late_it_is() -> None:
    machine = Machine()
    late: Source = lambda case: TimedKernel(case, refuses, compiles=True)  # noqa: E731
    sources = {"native": machine.takes(400.0, 400.0), "late": late}
    shapes = tuple(((4, 3, 5, side), 1) for side in range(2, 6))
    found = profile(machine, sources, shapes=shapes, seconds=4.0)
    errors = [str(row.error).split(":")[0] for row in found.rows if row.kernel == "late"]
    assert errors == ["torch.compile"] * 4
    assert not any(row.wrong for row in found.rows)


@pytest.mark.parametrize("order", [("native", "in place"), ("in place", "native")])
def test_a_kernel_that_writes_over_its_input_gets_a_copy_each_time(order: tuple[str, ...]) -> None:
    machine = Machine()

    def in_place(case: cases.Case) -> TimedKernel:
        def call(x: Tensor, *others: Any) -> Tensor:
            y = NATIVE(x.clone(), *others)
            x.data.zero_()
            return y

        return TimedKernel(case, call, overwrites=True)

    sources = {"native": machine.takes(1.0, 1.0), "in place": in_place}
    run = run_of(machine, {name: sources[name] for name in order}, operations=("bn",))
    assert [event.row.error for event in run.events() if isinstance(event, RowDone)] == [None, None]
