"""The kernel view against a machine whose times are known exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bncli.engine.load import CoreWait
from bncli.errors import Unavailable, UsageError
from bncli.measure.profile import kernels
from bncli.measure.profile.kernels import MOST_ROUNDS, Budget, KernelRun, KernelSettings
from bncli.measure.profile.shapes import Calls, shape_set
from bncli.measure.profile.timed_kernels import TimedKernel
from bncli.measure.reference import case as cases
from bncli.measure.timing import clock
from bncli.measure.timing.ceilings import CeilingBenchmark
from bncli.measure.timing.clock import CpuClock, Deadline
from bncli.results.profile import Case, KernelCost, KernelProfile, Measuring, Note, ProfileStarted, RowDone
from tests.measure.profile.fake_machine import (
    CPU,
    NATIVE,
    OVERHEAD_MS,
    SMALL,
    TICK_NS,
    Machine,
    Processes,
    Spent,
    profile,
    run_of,
)

# --- times ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> KernelProfile:
    machine = Machine()
    return profile(machine, {"native": machine.takes(2.0, 3.0), "rival": machine.takes(1.0, 1.5)})


def test_each_direction_has_its_own_time_and_the_speedup_is_of_both(found: KernelProfile) -> None:
    native, rival = found.rows
    for row, forward_ms, backward_ms in ((native, 2.0, 3.0), (rival, 1.0, 1.5)):
        assert row.forward is not None
        assert row.backward is not None
        assert row.both is not None
        assert row.forward.samples_ms == pytest.approx([forward_ms + OVERHEAD_MS] * 40)
        assert row.backward.samples_ms == pytest.approx([backward_ms + OVERHEAD_MS] * 40)
        assert row.both.samples_ms == pytest.approx([forward_ms + backward_ms + OVERHEAD_MS] * 40)
        assert (row.calls, row.ran, row.peak_memory_mib, row.error, row.wrong) == (2, "a fake", 1.5, None, False)
    assert native.faster is None
    assert rival.faster is not None
    assert rival.faster.value == pytest.approx(5.001 / 2.501)
    assert rival.faster.interval.low == pytest.approx(5.001 / 2.501)


def test_large_tensors_are_timed_in_new_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, state = Machine(), {"new": False, "given back": 0}

    @contextlib.contextmanager
    def new_memory() -> Iterator[Callable[[], None]]:
        state["new"] = True
        yield lambda: state.update({"given back": state["given back"] + 1})
        state["new"] = False

    def slow_in_new_memory(case: cases.Case) -> TimedKernel:
        return TimedKernel(case, lambda *given: Spent.apply(NATIVE(*given), machine, 7.0 if state["new"] else 2.0, 3.0))

    def found() -> KernelProfile:
        sources = {"native": slow_in_new_memory, "rival": machine.takes(1.0, 1.5)}
        return profile(machine, sources, shapes=(SMALL, ((4, 6, 5, 7), 1)))

    monkeypatch.setattr(kernels, "MAPPED_FROM_BYTES", 4 * 6 * 5 * 7 * 4)
    monkeypatch.setattr(kernels, "new_memory", new_memory)
    assert {row.new_memory for row in found().rows} == {None}  # this process does not keep freed memory
    monkeypatch.setattr(kernels, "freed_memory", lambda: "kept")
    *small, native, rival = (measured := found()).rows
    assert {row.new_memory for row in small} == {None}
    assert native.new_memory is not None
    assert native.new_memory.samples_ms == pytest.approx([10.001] * 40)
    assert (state["given back"], native.faster_new_memory) == (2 * 40, None)
    assert rival.faster is not None
    assert rival.faster.value == pytest.approx(5.001 / 2.501)
    assert rival.faster_new_memory is not None
    assert rival.faster_new_memory.value == pytest.approx(10.001 / 2.501)
    (mean,) = measured.means
    assert mean.faster.value == pytest.approx(5.001 / 2.501)
    assert mean.faster_new_memory is not None
    assert mean.faster_new_memory.value == pytest.approx((5.001 * 10.001) ** 0.5 / 2.501)


def test_each_row_has_the_cores_that_its_case_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreWait, "cores", lambda self: 0.7)
    machine = Machine()
    rows = profile(machine, {"native": machine.takes(2.0, 3.0), "rival": machine.takes(1.0, 1.5)}).rows
    assert {row.cores_lacked for row in rows} == {0.7}


def test_floor_bytes_count_tensors_and_saved_bytes_count_storages(found: KernelProfile) -> None:
    row, tensor_bytes = found.rows[0], 4 * 3 * 5 * 7 * 4
    assert row.both is not None
    assert row.forward is not None
    assert row.forward.floor_bytes == 2 * tensor_bytes
    assert row.both.floor_bytes == 5 * tensor_bytes
    assert row.forward.flops == (8 + 1) * 420
    assert row.saved_mib is not None
    assert 2 * tensor_bytes < row.saved_mib * 2**20 < 2 * tensor_bytes + 200  # x and y, and vectors of 3


def test_copies_are_medians_of_the_same_run(found: KernelProfile) -> None:
    ceilings = found.ceilings
    assert ceilings.copies == ((4096, pytest.approx(2 * 4096 / TICK_NS)), (8192, pytest.approx(2 * 8192 / TICK_NS)))
    assert ceilings.gflop_per_s == pytest.approx(2 * 4**3 / TICK_NS)


def test_a_mean_names_the_worst_shape() -> None:
    machine = Machine()

    def slow_on_many_channels(case: cases.Case) -> TimedKernel:
        return machine.takes(8.0 if case.shape[1] > 5 else 1.0, 1.0)(case)

    shapes = ((4, 3, 5, 7), 1), ((4, 6, 5, 7), 9)
    sources = {"native": machine.takes(3.0, 1.0), "rival": slow_on_many_channels}
    (mean,) = profile(machine, sources, shapes=shapes).means
    assert (mean.kernel, mean.operation, mean.shapes, mean.least_shape) == ("rival", "bn+relu", 2, (4, 6, 5, 7))
    assert mean.least == pytest.approx(4.001 / 9.001)
    assert mean.faster.value == pytest.approx(((4.001 / 2.001) * (4.001 / 9.001)) ** 0.5)


def test_without_native_there_is_no_speedup_and_without_a_peak_a_note() -> None:
    machine = Machine()
    alone = profile(machine, {"rival": machine.takes(1.0, 1.0)}, Processes(None))
    assert alone.rows[0].both is not None
    assert alone.rows[0].faster is None
    assert alone.means == ()
    assert alone.rows[0].peak_memory_mib is None
    assert Note("peak unknown", "rival", (Case(SMALL[0], "bn+relu", "fp32"),), reason="it hung") in alone.notes


# --- the budget -------------------------------------------------------------------------------------------------------


def test_a_case_has_the_rounds_that_fit_in_its_share_of_the_time() -> None:
    now = [0.0]
    budget = Budget(Deadline(100.0, lambda: now[0]), 0.5, 6, lambda: now[0])
    alone = min(clock.FEWEST_ROUNDS, 6)
    assert budget.rounds(1.0) == (20, 20)  # 50 s, and a round of each direction alone takes half as long again
    assert budget.rounds(0.0) == budget.rounds(1e-6) == (MOST_ROUNDS, MOST_ROUNDS)
    assert budget.rounds(30.0) == (6, alone)
    now[0] = 10.0
    assert budget.rounds(1.0) == (16, 16)
    assert budget.least_s(2.0) == 10.0 + (6 + 1.5 * alone) * 2.0


@pytest.mark.parametrize("shapes", [1, 4])
def test_rounds_fill_the_time_and_no_more(shapes: int) -> None:
    machine = Machine()
    asked = tuple(((4, 3, 5, side), 1) for side in range(2, 2 + shapes))
    found = profile(machine, {"native": machine.takes(20.0, 20.0)}, shapes=asked, seconds=10.0)
    assert 6.0 < found.seconds <= 10.0 or all(_rounds(row) == 40 for row in found.rows)
    assert all(_rounds(row) >= 6 for row in found.rows)


def _rounds(row: KernelCost) -> int:
    assert row.both is not None
    return len(row.both.samples_ms)


THREE = ((4, 3, 5, 7), 1), ((4, 4, 5, 7), 1), ((4, 5, 5, 7), 1)


@pytest.mark.parametrize(("least", "rounds", "alone"), [(6, 6, 3), (9, 9, 3), (50, 50, 3), (2, 2, 2)])
def test_every_case_has_the_fewest_rounds_however_little_time_there_is(least: int, rounds: int, alone: int) -> None:
    machine = Machine()
    sources = {"native": machine.takes(500.0, 500.0), "rival": machine.takes(500.0, 500.0)}
    found = profile(machine, sources, shapes=THREE, seconds=1.0, least_rounds=least)
    assert [row.error for row in found.rows] == [None] * 6
    assert {_rounds(row) for row in found.rows} == {rounds}
    assert {len(row.forward.samples_ms) for row in found.rows if row.forward} == {alone}
    unbounded = {row.faster.interval.low is None for row in found.rows if row.faster}
    assert unbounded == {rounds < 6}
    assert [note.count for note in found.notes if note.kind == "few rounds"] == [6] * (rounds < 6)


def test_more_time_gives_more_rounds_of_both_directions_first() -> None:
    machine = Machine()
    (row,) = profile(machine, {"native": machine.takes(50.0, 50.0)}, seconds=2.0).rows
    assert row.forward is not None
    assert 6 <= _rounds(row) == len(row.forward.samples_ms) < 40


@pytest.mark.parametrize("seconds", [1.0, 100.0])
def test_the_least_time_that_it_takes_is_known_after_the_first_case(seconds: float) -> None:
    machine = Machine()
    run = run_of(machine, {"native": machine.takes(500.0, 500.0)}, shapes=THREE, seconds=seconds)
    events = list(run.events())
    assert isinstance(events[0], ProfileStarted)
    assert events[0].seconds == seconds
    # Of the first case nothing is known when it begins.
    _, *later = [event.least_s for event in events if isinstance(event, Measuring) and event.phase == "case"]
    assert len(later) == 2
    if seconds == 1.0:
        assert later == pytest.approx([run.result().seconds] * 2, rel=0.1)
    else:
        assert max(later) < run.result().seconds <= seconds


# --- events, and an interruption --------------------------------------------------------------------------------------


def test_events_say_what_is_planned_what_is_measured_and_each_row() -> None:
    machine, processes = Machine(), Processes()
    run = run_of(machine, {"native": machine.takes(1.0, 1.0)}, processes, shapes=(SMALL, ((2, 9), 1)))
    before = run.result()
    assert (before.rows, before.means, before.ceilings.copies, before.planned) == ((), (), (), 2)
    events = list(run.events())
    assert events[0] == ProfileStarted("kernels", 2, 40.0)
    measuring = [event for event in events if isinstance(event, Measuring)]
    assert [event.phase for event in measuring] == ["ceilings", "case", "case", "ceilings"]
    assert [event.subject for event in measuring[1:3]] == [f"fp32 contiguous bn+relu {s}" for s in ("4x3x5x7", "2x9")]
    fractions = [event.fraction for event in measuring]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert [event.row for event in events if isinstance(event, RowDone)] == list(run.result().rows)
    assert processes.closed


def test_an_interrupted_run_has_the_rows_of_finished_cases() -> None:
    machine, processes = Machine(), Processes()

    def interrupted(case: cases.Case) -> TimedKernel:
        if case.shape == (2, 9):
            raise KeyboardInterrupt
        return machine.takes(1.0, 1.0)(case)

    sources = {"native": machine.takes(1.0, 1.0), "rival": interrupted}
    run = run_of(machine, sources, processes, shapes=(SMALL, ((2, 9), 1)))
    with pytest.raises(KeyboardInterrupt):
        list(run.events())
    found = run.result()
    assert [row.kernel for row in found.rows] == ["native", "rival"]
    assert (found.planned, len(found.ceilings.copies), len(found.means)) == (4, 2, 1)
    assert processes.closed


# --- settings ---------------------------------------------------------------------------------------------------------


def cases_of(**settings: Any) -> dict[Case, int]:
    return dict(KernelSettings(**settings).cases())


def test_without_operations_each_shape_has_those_that_the_model_does_there() -> None:
    found = cases_of(shapes=shape_set("resnet50"))
    assert len(found) == 16
    assert sum(found.values()) == 53
    assert found[Case((16, 2048, 7, 7), "bn+add+relu", "fp32")] == 3
    typed = cases_of(shapes=(((2, 3, 4), 1),))
    assert [case.operation for case in typed] == ["bn", "bn+relu", "bn+add+relu"]


LAYOUTS = ("contiguous", "channels_last")


def test_operations_dtypes_and_layouts_multiply_without_repetition() -> None:
    shapes = (*shape_set("mlp"), Calls((2, 3, 4, 4), 5))
    found = cases_of(operations=("bn", "bn+silu"), dtypes=("fp32", "bf16"), layouts=LAYOUTS, shapes=shapes)
    vectors = [case for case in found if case.shape == (60, 100)]
    assert {case.layout for case in vectors} == {"contiguous"}  # which has no channels last
    assert (len(vectors), len(found)) == (4, 4 + 8)
    assert found[Case((60, 100), "bn", "bf16")] == 3
    assert found[Case((60, 100), "bn+silu", "fp32")] == 0  # what the model does not do


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operations": ("bn+tanh",)}, "operations bn+tanh: expected some of bn, bn+relu"),
        ({"dtypes": ("fp8",)}, "dtypes fp8: expected some of bf16"),
        ({"layouts": ("nhwc",)}, "layouts nhwc: expected some of contiguous, channels_last"),
        ({"kernels": ()}, "kernels: name at least one"),
        ({"kernels": ("nativ",)}, "kernel nativ: there is no such kernel; did you mean native"),
        (
            {"kernels": ("mine:norm",)},
            "kernel mine:norm: it is your own code, which would be executed; allow it with allow_code=True",
        ),
        ({"kernels": ("nobodys:norm",), "allow_code": True}, "No module named 'nobodys'"),
        ({"shapes": ()}, "shapes: name a set of shapes"),
        ({"shapes": (((1, 8), 1),)}, "shape 1x8: training needs more than one value per channel"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        KernelRun(KernelSettings(**{"kernels": ("native",), "shapes": (SMALL,), **settings}), CPU)
    assert said in str(refused.value)


def test_all_mistakes_are_found_at_once_each_with_its_argument() -> None:
    shapes = (((1, 8), 1), ((2, 8), 1))
    with pytest.raises(UsageError) as refused:
        cases_of(operations=("bn", "relu"), dtypes=("fp8",), layouts=("nhwc",), shapes=shapes)
    assert [(error.field, error.value) for error in refused.value.errors] == [
        ("operations", "relu"), ("dtypes", "fp8"), ("layouts", "nhwc"), ("shape", "1x8"),
    ]  # fmt: skip
    assert len(cases_of(operations=("bn",), shapes=shapes[:1], training=False)) == 1  # which takes one value a channel


def test_a_device_without_a_clock_is_refused() -> None:
    with pytest.raises(Unavailable, match="mps"):
        KernelRun(KernelSettings(shapes=(SMALL,)), torch.device("mps"))


# --- real kernels -----------------------------------------------------------------------------------------------------


def real_rows(*kernels: str, **settings: Any) -> Iterator[KernelCost]:
    timer, processes = CpuClock(flush_bytes=64), Processes()
    run = KernelRun(
        KernelSettings(**{"kernels": kernels, "shapes": (SMALL,), "seconds": 0.01, "allow_code": True, **settings}),
        CPU,
        timer,
        processes=processes,  # type: ignore[arg-type]
        peak_mib=processes.peak_mib,
        ceilings=CeilingBenchmark(timer, CPU, cold=True, sizes=(4096,), matrix_side=4),
    )
    for event in run.events():
        if isinstance(event, RowDone):
            yield event.row


def test_the_users_own_function_is_measured_also_where_it_fuses_nothing() -> None:
    own = ("bncli.kernels.native:batch_norm", "torch.nn.functional:batch_norm")
    for row in real_rows("native", *own, operations=("bn", "bn+add+relu")):
        assert row.error is None
        assert row.both is not None
        assert (row.ran == "ATen") == (row.kernel == "native")


@pytest.mark.parametrize("training", [True, False])
def test_native_is_right_in_all_dtypes_layouts_and_operations(training: bool) -> None:
    settings = {"operations": tuple(cases.OPERATIONS), "dtypes": tuple(cases.DTYPE_NAMES), "training": training}
    rows = list(real_rows("native", layouts=(*LAYOUTS, "strided"), least_rounds=1, **settings))
    assert len(rows) == 5 * 4 * 3
    assert [str(row.case) for row in rows if row.error is not None] == []
