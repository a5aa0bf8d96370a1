"""The kernel view against a machine whose times are known exactly, and kernels of which some are wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.errors import Unavailable, UsageError
from bncli.measure.profile.budget import Asked, planned
from bncli.measure.profile.candidates import Candidate, Source
from bncli.measure.profile.kernels import KernelRun
from bncli.measure.profile.shapes import Calls, shape_set
from bncli.measure.reference import case as cases
from bncli.measure.reference.candidate import by_name
from bncli.measure.reference.case import EPS
from bncli.measure.timing.ceilings import Ladder
from bncli.measure.timing.clock import CpuClock
from bncli.results.profile import Case, KernelCost, KernelProfile, Measuring, Note, ProfileStarted, RowDone

CPU = torch.device("cpu")
SMALL = ((4, 3, 5, 7), 2)
TICK_NS = 1000  # that reading the clock takes
OVERHEAD_MS = TICK_NS / 1e6


class Machine:
    """A host whose clock moves when it is read, and when a kernel says so; all times in ms."""

    def __init__(self) -> None:
        self.passed_ns = 0

    def now_ns(self) -> int:
        self.passed_ns += TICK_NS
        return self.passed_ns

    def now_s(self) -> float:
        return self.passed_ns / 1e9

    def takes(self, forward_ms: float, backward_ms: float) -> Source:
        """Native's kernel, for that long on the cases that are timed."""

        def source(case: cases.Case) -> Candidate:
            if case.eps != EPS:
                return Candidate(case, NATIVE)
            return Candidate(case, lambda *given: Spent.apply(NATIVE(*given), self, forward_ms, backward_ms), "a fake")

        return source


NATIVE = by_name("native")


class Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, machine: Machine, forward_ms: float, backward_ms: float) -> Tensor:
        machine.passed_ns += round(forward_ms * 1e6)
        ctx.machine, ctx.backward_ms = machine, backward_ms
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.machine.passed_ns += round(ctx.backward_ms * 1e6)
        return gradients[0], None, None, None


class Peaks:
    """Stands in for fresh processes."""

    def __init__(self, mib: float | None = 1.5) -> None:
        self.mib, self.log = mib, list[str]()
        self.failure = None if mib is not None else "it hung"

    def start(self) -> None:
        self.log.append("start")

    def peak_mib(self, case: Case, kernel: str) -> float | None:
        self.log.append(f"{kernel} {case}")
        return self.mib

    def close(self) -> None:
        self.log.append("close")


def run_of(machine: Machine, sources: dict[str, Source], peaks: Peaks | None = None, **asked: Any) -> KernelRun:
    clock = CpuClock(flush_bytes=64, now_ns=machine.now_ns)
    ladder = Ladder(clock, CPU, cold=True, sizes=(4096, 8192), matrix_side=4)
    given = Asked(**{"kernels": tuple(sources), "operations": ("bn+relu",), "shapes": (SMALL,), **asked})
    return KernelRun(given, CPU, clock, peaks=peaks or Peaks(), sources=sources, ladder=ladder, now_s=machine.now_s)


def profile(machine: Machine, sources: dict[str, Source], peaks: Peaks | None = None, **asked: Any) -> KernelProfile:
    run = run_of(machine, sources, peaks, **asked)
    for _ in run.events():
        pass
    return run.result()


def row_of(found: KernelProfile, kernel: str) -> KernelCost:
    return next(row for row in found.rows if row.kernel == kernel)


# --- times ------------------------------------------------------------------------------------------------------------


def test_each_direction_has_its_own_time_and_the_ratio_is_of_both() -> None:
    machine = Machine()
    found = profile(machine, {"native": machine.takes(2.0, 3.0), "rival": machine.takes(1.0, 1.5)})
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


def test_bytes_are_those_of_the_floor_and_saved_ones_those_of_the_storages() -> None:
    machine = Machine()
    (row,) = profile(machine, {"native": machine.takes(1.0, 1.0)}).rows
    tensor_bytes = 4 * 3 * 5 * 7 * 4
    assert row.both is not None
    assert row.forward is not None
    assert row.forward.floor_bytes == 2 * tensor_bytes
    assert row.both.floor_bytes == 5 * tensor_bytes
    assert row.forward.flops == (8 + 1) * 420
    assert row.saved_mib is not None
    assert 2 * tensor_bytes < row.saved_mib * 2**20 < 2 * tensor_bytes + 200  # x and y, and vectors of 3


def test_a_mean_names_the_worst_shape() -> None:
    machine = Machine()

    def slow_on_many_channels(case: cases.Case) -> Candidate:
        return machine.takes(8.0 if case.shape[1] > 5 else 1.0, 1.0)(case)

    shapes = ((4, 3, 5, 7), 1), ((4, 6, 5, 7), 9)
    sources = {"native": machine.takes(3.0, 1.0), "rival": slow_on_many_channels}
    (mean,) = profile(machine, sources, shapes=shapes).means
    assert (mean.kernel, mean.operation, mean.shapes, mean.least_shape) == ("rival", "bn+relu", 2, (4, 6, 5, 7))
    assert mean.least == pytest.approx(4.001 / 9.001)
    assert mean.faster.value == pytest.approx(((4.001 / 2.001) * (4.001 / 9.001)) ** 0.5)


def test_without_native_in_the_run_there_are_times_and_no_ratios() -> None:
    machine = Machine()
    found = profile(machine, {"rival": machine.takes(1.0, 1.0)})
    assert found.rows[0].both is not None
    assert found.rows[0].faster is None
    assert found.means == ()


def test_copies_are_medians_of_the_same_run() -> None:
    machine = Machine()
    ceilings = profile(machine, {"native": machine.takes(1.0, 1.0)}).ceilings
    assert ceilings.copies == ((4096, pytest.approx(2 * 4096 / TICK_NS)), (8192, pytest.approx(2 * 8192 / TICK_NS)))
    assert ceilings.gflop_per_s == pytest.approx(2 * 4**3 / TICK_NS)


# --- correctness first ------------------------------------------------------------------------------------------------


Spoil = Callable[[tuple[Any, ...], Tensor], Tensor]


def broken(spoil: Spoil, *, everywhere: bool = False) -> Source:
    """Native's kernel, whose result is spoilt; on the cases that are timed alone, or on small ones too."""

    def source(case: cases.Case) -> Candidate:
        if case.eps != EPS and not everywhere:
            return Candidate(case, NATIVE)
        return Candidate(case, lambda *given: spoil(given, NATIVE(*given)), "broken")

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


WRONG: list[tuple[Spoil, str, str]] = [  # the kind of the finding and its quantity, empty for the call as a whole
    (lambda given, y: y * 1.01, "off", "forward"),
    (in_the_gradient, "off", "dx"),
    (in_the_last_channel, "off", "forward"),
    (in_one_element, "nan_unexpected", "forward"),
    (in_running_var, "off", "running_var"),
    (without_the_last_element, "nan_unexpected", "forward"),
    (lambda given, y: y.double(), "wrong_dtype", ""),
    (lambda given, y: y.flatten(2), "wrong_shape", ""),
    (into_x, "input_written", ""),
]


@pytest.mark.parametrize(("spoil", "kind", "quantity"), WRONG)
def test_a_wrong_kernel_gets_its_finding_and_no_time(spoil: Spoil, kind: str, quantity: str) -> None:
    machine = Machine()
    found = profile(machine, {"native": machine.takes(1.0, 1.0), "mine": broken(spoil)})
    mine = row_of(found, "mine")
    assert mine.wrong
    assert mine.error == "wrong result"
    assert mine.finding is not None
    assert mine.finding.kind == kind
    assert mine.finding.quantity == quantity
    assert mine.wrong_case is None
    assert (mine.forward, mine.backward, mine.both, mine.faster, mine.saved_mib) == (None,) * 5
    assert row_of(found, "native").both is not None


def test_a_kernel_that_is_wrong_on_a_small_case_alone_gets_rows_that_name_it_and_is_judged_there_once() -> None:
    machine = Machine()
    made: list[cases.Case] = []

    def wrong_in_half_precision(case: cases.Case) -> Candidate:
        made.append(case)
        call: Any = (lambda *given: NATIVE(*given) * 1.25) if case.dtype == "float16" else NATIVE
        return Candidate(case, call)

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

    def picky(case: cases.Case) -> Candidate:
        def call(*given: Any) -> Tensor:
            if case.stored == torch.bfloat16:
                raise TypeError("no bfloat16")
            if case.activation == "silu":
                raise NotImplementedError("no silu")
            return NATIVE(*given)

        if case.mode == "eval":
            raise Unavailable("training alone")
        return Candidate(case, call)

    found = profile(machine, {"native": machine.takes(1.0, 1.0), "mine": picky})
    assert row_of(found, "mine").error is None
    assert row_of(found, "mine").judged_on_cases


def test_a_large_case_is_run_whole_and_judged_from_the_first_channel_to_the_last() -> None:
    machine = Machine()
    large = ((2, 5, 512, 128), 1)  # 131,072 values a channel: three channels are judged
    sources = {"native": machine.takes(1.0, 1.0), "last": broken(in_the_last_channel), "one": broken(in_one_element)}
    found = profile(machine, sources, shapes=(large,))
    assert [row.wrong for row in found.rows] == [False, True, True]
    assert [note.kind for note in found.notes if note.cases] == ["channels sampled"]


def test_what_is_missing_is_an_error_and_not_a_wrong_result() -> None:
    machine = Machine()

    def missing(case: cases.Case) -> Candidate:
        raise Unavailable("not installed (pip install rival)")

    found = profile(machine, {"native": machine.takes(1.0, 1.0), "rival": missing})
    rival = row_of(found, "rival")
    assert (rival.error, rival.wrong, rival.both) == ("not installed (pip install rival)", False, None)


def test_a_kernel_that_raises_is_wrong_and_the_others_rows_stand() -> None:
    machine = Machine()

    def raises(*given: Any) -> Tensor:
        raise ValueError("of mine\nin detail")

    found = profile(machine, {"mine": lambda case: Candidate(case, raises), "native": machine.takes(1.0, 1.0)})
    assert (row_of(found, "mine").error, row_of(found, "mine").wrong) == ("ValueError: of mine", True)
    assert row_of(found, "native").both is not None


def test_a_kernel_that_is_right_once_and_then_raises_has_no_time() -> None:
    machine = Machine()

    def source(case: cases.Case) -> Candidate:
        calls = itertools.count()

        def call(*given: Any) -> Tensor:
            if next(calls) >= 2:  # it is judged, and what it saves is counted
                raise RuntimeError("tired")
            return NATIVE(*given)

        return Candidate(case, call)

    found = profile(machine, {"native": machine.takes(1.0, 1.0), "mine": source})
    assert (row_of(found, "mine").error, row_of(found, "mine").both) == ("RuntimeError: tired", None)
    assert row_of(found, "native").both is not None


def test_what_cannot_be_compiled_says_why_and_compilation_is_in_no_row() -> None:
    machine = Machine()

    def refuses(*given: Any) -> Tensor:
        raise RuntimeError("no compiler")

    def bad(case: cases.Case) -> Candidate:
        return Candidate(case, refuses, compiles=True)

    def compiles(case: cases.Case) -> Candidate:
        calls = itertools.count()

        def call(*given: Any) -> Tensor:
            machine.passed_ns += 0 if next(calls) else 7_000_000_000
            return NATIVE(*given)

        return Candidate(case, call, compiles=True)

    sources = {"native": machine.takes(1.0, 1.0), "bad": bad, "good": compiles}
    found = profile(machine, sources)
    assert (row_of(found, "bad").error, row_of(found, "bad").wrong) == (
        "torch.compile: RuntimeError: no compiler",
        False,
    )
    good = row_of(found, "good")
    assert good.both is not None
    assert not good.judged_on_cases
    assert max(good.both.samples_ms) == pytest.approx(OVERHEAD_MS)
    assert good.peak_memory_mib is None
    assert Note("compilation", "good", seconds=7.0) in found.notes
    assert Note("peak needs compilation", "good") in found.notes


def test_what_is_asked_for_is_compiled_however_late_it_is() -> None:
    machine = Machine()

    def refuses(*given: Any) -> Tensor:
        raise RuntimeError("no compiler")

    late: Source = lambda case: Candidate(case, refuses, compiles=True)  # noqa: E731
    sources = {"native": machine.takes(400.0, 400.0), "late": late}
    shapes = tuple(((4, 3, 5, side), 1) for side in range(2, 6))
    found = profile(machine, sources, shapes=shapes, seconds=4.0)
    said = [str(row.error).split(":")[0] for row in found.rows if row.kernel == "late"]
    assert said == ["torch.compile"] * 4
    assert not any(row.wrong for row in found.rows)


def test_a_kernel_that_writes_over_its_input_gets_a_copy_each_time() -> None:
    machine = Machine()

    def in_place(case: cases.Case) -> Candidate:
        def call(x: Tensor, *others: Any) -> Tensor:
            y = NATIVE(x.clone(), *others)
            x.data.zero_()
            return y

        return Candidate(case, call, overwrites=True)

    found = profile(machine, {"native": machine.takes(1.0, 1.0), "in place": in_place}, operations=("bn",))
    assert [row.error for row in found.rows] == [None, None]
    run = run_of(machine, {"in place": in_place, "native": machine.takes(1.0, 1.0)}, operations=("bn",))
    assert [event.row.error for event in run.events() if isinstance(event, RowDone)] == [None, None]


# --- the budget -------------------------------------------------------------------------------------------------------


def test_rounds_fill_the_time_and_no_more() -> None:
    for seconds, cases_count in ((10.0, 1), (10.0, 4)):
        machine = Machine()
        shapes = tuple(((4, 3, 5, side), 1) for side in range(2, 2 + cases_count))
        found = profile(machine, {"native": machine.takes(20.0, 20.0)}, shapes=shapes, seconds=seconds)
        assert 0.6 * seconds < found.seconds <= seconds or all(_rounds(row) == 40 for row in found.rows)
        assert all(_rounds(row) >= 6 for row in found.rows)


def _rounds(row: KernelCost) -> int:
    assert row.both is not None
    return len(row.both.samples_ms)


@pytest.mark.parametrize(("least", "rounds", "alone"), [(6, 6, 3), (9, 9, 3), (50, 50, 3), (2, 2, 2)])
def test_every_case_has_the_fewest_rounds_however_little_time_there_is(least: int, rounds: int, alone: int) -> None:
    machine = Machine()
    shapes = ((4, 3, 5, 7), 1), ((4, 4, 5, 7), 1), ((4, 5, 5, 7), 1)
    sources = {"native": machine.takes(500.0, 500.0), "rival": machine.takes(500.0, 500.0)}
    found = profile(machine, sources, shapes=shapes, seconds=1.0, least_rounds=least)
    assert [row.error for row in found.rows] == [None] * 6
    assert {_rounds(row) for row in found.rows} == {rounds}
    assert {len(row.forward.samples_ms) for row in found.rows if row.forward} == {alone}
    unbounded = {row.faster.interval.low is None for row in found.rows if row.faster}
    assert unbounded == {rounds < 6}
    assert [note.count for note in found.notes if note.kind == "few rounds"] == [6] * (rounds < 6)


def test_with_a_little_more_time_there_are_more_rounds_of_both_directions_first() -> None:
    machine = Machine()
    (row,) = profile(machine, {"native": machine.takes(50.0, 50.0)}, seconds=2.0).rows
    assert row.forward is not None
    assert 6 <= _rounds(row) == len(row.forward.samples_ms) < 40


def test_how_long_it_takes_at_the_least_is_told_after_the_first_case() -> None:
    for seconds in (1.0, 100.0):
        machine = Machine()
        shapes = ((4, 3, 5, 7), 1), ((4, 4, 5, 7), 1), ((4, 5, 5, 7), 1)
        run = run_of(machine, {"native": machine.takes(500.0, 500.0)}, shapes=shapes, seconds=seconds)
        events = list(run.events())
        started, _, *least_s = [event for event in events if isinstance(event, (ProfileStarted, Measuring))]
        assert isinstance(started, ProfileStarted)
        assert started.seconds == seconds
        told = [event.least_s for event in least_s[1:-1] if isinstance(event, Measuring)]
        assert len(told) == 2  # of the first case nothing is known
        if seconds == 1.0:
            assert told == pytest.approx([run.result().seconds] * 2, rel=0.1)
        else:
            assert max(told) < run.result().seconds <= seconds


# --- events, and an interruption --------------------------------------------------------------------------------------


def test_events_tell_what_is_planned_what_goes_on_and_each_row() -> None:
    machine, peaks = Machine(), Peaks()
    run = run_of(machine, {"native": machine.takes(1.0, 1.0)}, peaks, shapes=(SMALL, ((2, 9), 1)))
    events = list(run.events())
    assert events[0] == ProfileStarted("kernels", 2, 40.0)
    fractions = [event.fraction for event in events if isinstance(event, Measuring)]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert [event.row for event in events if isinstance(event, RowDone)] == list(run.result().rows)
    assert peaks.log[0] == "start"
    assert peaks.log[-1] == "close"


def test_an_interrupted_run_has_the_rows_of_finished_cases_and_leaves_no_process() -> None:
    machine, peaks = Machine(), Peaks()

    def interrupted(case: cases.Case) -> Candidate:
        if case.shape == (2, 9):
            raise KeyboardInterrupt
        return machine.takes(1.0, 1.0)(case)

    sources = {"native": machine.takes(1.0, 1.0), "rival": interrupted}
    run = run_of(machine, sources, peaks, shapes=(SMALL, ((2, 9), 1)))
    with pytest.raises(KeyboardInterrupt):
        list(run.events())
    found = run.result()
    assert [row.kernel for row in found.rows] == ["native", "rival"]
    assert (found.planned, len(found.ceilings.copies), len(found.means)) == (4, 2, 1)
    assert peaks.log[-1] == "close"


def test_a_run_that_never_began_has_an_empty_result() -> None:
    machine = Machine()
    found = run_of(machine, {"native": machine.takes(1.0, 1.0)}).result()
    assert (found.rows, found.means, found.ceilings.copies, found.planned) == ((), (), (), 1)


def test_a_peak_that_could_not_be_had_is_unknown_and_noted() -> None:
    machine = Machine()
    found = profile(machine, {"native": machine.takes(1.0, 1.0)}, Peaks(None))
    assert found.rows[0].peak_memory_mib is None
    assert found.rows[0].both is not None
    cases = (Case((4, 3, 5, 7), "bn+relu", "fp32"),)
    assert Note("peak unknown", "native", cases, reason="it hung") in found.notes


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_without_operations_each_shape_has_those_that_the_model_does_there() -> None:
    found = dict(planned(Asked(shapes=shape_set("resnet50"))))
    assert len(found) == 16
    assert sum(found.values()) == 53
    assert found[Case((16, 2048, 7, 7), "bn+add+relu", "fp32")] == 3
    typed = planned(Asked(shapes=(((2, 3, 4), 1),)))
    assert [case.operation for case, _ in typed] == ["bn", "bn+relu", "bn+add+relu"]


def test_operations_dtypes_and_layouts_multiply_and_each_case_is_measured_once() -> None:
    shapes = (*shape_set("mlp"), Calls((2, 3, 4, 4), 5))
    found = dict(planned(Asked(operations=("bn", "bn+silu"), dtypes=("fp32", "bf16"), layouts=LAYOUTS, shapes=shapes)))
    vectors = [case for case in found if case.shape == (60, 100)]
    assert {case.layout for case in vectors} == {"contiguous"}  # which has no channels last
    assert (len(vectors), len(found)) == (4, 4 + 8)
    assert found[Case((60, 100), "bn", "bf16")] == 3
    assert found[Case((60, 100), "bn+silu", "fp32")] == 0  # what the model does not do


LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"operations": ("bn+tanh",)}, "operations bn+tanh: expected some of bn, bn+relu"),
        ({"dtypes": ("fp8",)}, "dtypes fp8: expected some of bf16"),
        ({"layouts": ("nhwc",)}, "layouts nhwc: expected some of contiguous, channels_last"),
        ({"kernels": ()}, "kernels: name at least one"),
        ({"kernels": ("nativ",)}, "kernel nativ: there is no such kernel; did you mean native"),
        (
            {"kernels": ("mine:norm",)},
            "kernel mine:norm: it is code of yours that would run; allow it with allow_code=True",
        ),
        ({"kernels": ("nobodys:norm",), "allow_code": True}, "No module named 'nobodys'"),
        ({"shapes": ()}, "shapes: name a set of shapes"),
        ({"shapes": (((1, 8), 1),)}, "shape 1x8: training needs more than one value a channel"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        KernelRun(Asked(**{"kernels": ("native",), "shapes": (SMALL,), **asked}), CPU)
    assert said in str(refused.value)


def test_a_device_without_a_clock_is_refused() -> None:
    with pytest.raises(Unavailable, match="mps"):
        KernelRun(Asked(shapes=(SMALL,)), torch.device("mps"))


def real_rows(*kernels: str, **asked: Any) -> Iterator[KernelCost]:
    clock = CpuClock(flush_bytes=64)
    ladder = Ladder(clock, CPU, cold=True, sizes=(4096,), matrix_side=4)
    given = Asked(**{"kernels": kernels, "shapes": (SMALL,), "seconds": 0.5, "allow_code": True, **asked})
    run = KernelRun(given, CPU, clock, peaks=Peaks(), ladder=ladder)
    for event in run.events():
        if isinstance(event, RowDone):
            yield event.row


def test_the_users_own_function_is_measured_also_where_it_fuses_nothing() -> None:
    own = ("bncli.kernels.native:batch_norm", "torch.nn.functional:batch_norm")
    for row in real_rows("native", *own, operations=("bn", "bn+add+relu")):
        assert row.error is None
        assert row.both is not None
        assert (row.ran == "ATen") == (row.kernel == "native")


def test_all_dtypes_layouts_and_operations_of_native_are_right_in_training_and_evaluation() -> None:
    layouts, dtypes = (*LAYOUTS, "strided"), tuple(cases.DTYPE_NAMES)
    for training in (True, False):
        asked = {"operations": tuple(cases.OPERATIONS), "dtypes": dtypes, "layouts": layouts, "training": training}
        rows = list(real_rows("native", seconds=60.0, **asked))
        assert len(rows) == 5 * 4 * 3
        assert [str(row.case) for row in rows if row.error is not None] == []
