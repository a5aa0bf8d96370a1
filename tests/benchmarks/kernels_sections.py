"""The sections of the kernel benchmark: each measures with the modules beside it, and reports row by row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bncli.measure.profile import candidates
from bncli.measure.profile.candidates import Source
from bncli.measure.reference.case import timed
from bncli.measure.timing import clock as timing
from bncli.measure.timing.clock import Clock, Deadline
from bncli.report.text import finding_text
from bncli.results.profile import Case, KernelCost
from tests.benchmarks import kernels_environment as environment
from tests.benchmarks import kernels_report as printed
from tests.benchmarks import kernels_resnet as resnets
from tests.benchmarks import kernels_speed as speed
from tests.benchmarks.kernels_pool import Pool, Task
from tests.benchmarks.kernels_report import Report
from tests.benchmarks.kernels_speed import Target

HANG_S = 120.0  # of one task in a process that checks: its start and a few compilations in it
LARGE_ELEMENTS = 2**26  # above which few are checked at a time: float64 tensors of half a GiB and more
FEW_JOBS = 2
SINGLE_COPY_BYTES = 2**30


@dataclass
class Run:
    """What every section needs."""

    report: Report
    device: torch.device
    clock: Clock
    candidate: str
    interpreted: bool
    quick: bool
    pool: Pool
    rounds: int
    copy_gb_per_s: float | None = None
    sources: dict[str, Source] = field(default_factory=dict)  # of kernels that are not known by name
    right: set[Case] = field(default_factory=set)  # cases that passed every check in a form that may be timed

    def sources_of(self, names: Sequence[str]) -> dict[str, Source]:
        """Where bncli profile's own run gets those kernels from."""
        made = candidates.sources([name for name in names if name not in self.sources], self.device, False)
        return {name: self.sources.get(name) or made[name] for name in names}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def target(self, case: str, found: list[Target]) -> None:
        """Kept for the summary, on the GPU that the GPU's targets were set for."""
        if self.cuda:
            self.report.target(case, found)


def words_of(row: KernelCost) -> str:
    """What is wrong with a row, or missing."""
    return row.error or "" if row.finding is None else f"{row.finding.quantity}: {finding_text(row.finding)}"


def correctness(run: Run, tasks_of: Callable[[torch.device, str, bool, bool], list[Task]], deadline: Deadline) -> None:
    run.report.heading("Correctness")
    tasks = tasks_of(run.device, run.candidate, run.quick, run.interpreted)
    done = 0
    for _, checks in run.pool.checked(tasks, deadline):
        run.report.check(checks)
        done += 1
    run.report.check_table()
    if done < len(tasks):
        run.report.note(f"correctness: {len(tasks) - done} of {len(tasks)} cases, for lack of time")


def copy(run: Run, deadline: Deadline) -> None:
    run.report.heading("What a copy and a launch cost here")
    clocks = environment.clocks(run.device)
    sizes = [SINGLE_COPY_BYTES] if run.cuda else [2**20]
    if run.cuda:
        sizes += sorted({case.tensor_bytes for case in speed.layer_cases(True, run.quick)}, reverse=True)
    for size in sizes:
        if deadline.passed and run.copy_gb_per_s is not None:
            run.report.note("copy: the smaller sizes, for lack of time")
            break
        moved, samples = environment.copy_samples(size, run.device, run.clock, run.rounds)
        bandwidth = [timing.gb_per_s(moved, ms) for ms in samples]
        run.report.record("copy", size_bytes=size, moved_bytes=moved, samples_ms=samples)
        found = timing.spread(bandwidth)
        quartiles = f"[{found.low:.0f}, {found.high:.0f}]"
        run.report.line(f"copy of {size / 1e6:8.1f} MB: {found.median:7.0f} GB/s {quartiles}, read and written")
        if run.copy_gb_per_s is None:
            run.copy_gb_per_s = found.median
    for name, samples in environment.launch_samples(run.device, run.clock, run.rounds).items():
        run.report.record("launch", name=name, samples_ms=samples)
        run.report.line(f"{name}: {1e3 * statistics.median(samples):.2f} us a launch")
    for name, found in environment.same_twice(run.device, run.clock, run.rounds).items():
        run.report.line(f"the same work timed against itself, {name}: {printed.ratio(found)} (the noise of a ratio)")
    run.report.line(f"clocks before: {clocks}; after: {environment.clocks(run.device)}")


def _copy_gb_per_s(run: Run) -> float:
    """Measured in this run, by now at the latest."""
    if run.copy_gb_per_s is None:
        moved, samples = environment.copy_samples(
            SINGLE_COPY_BYTES if run.cuda else 2**20, run.device, run.clock, run.rounds
        )
        run.copy_gb_per_s = timing.gb_per_s(moved, statistics.median(samples))
        run.report.record("copy", size_bytes=SINGLE_COPY_BYTES, moved_bytes=moved, samples_ms=samples)
        run.report.line(f"copy: {run.copy_gb_per_s:.0f} GB/s, read and written")
    return run.copy_gb_per_s


def _beside_compile(run: Run, case: Case) -> bool:
    """Whether torch.compile is one of the arms: on the GPU, for the layout that the targets against it are for."""
    return run.cuda and case.layout == "contiguous"


def make_right(run: Run, wanted: Sequence[Case], with_compile: bool, deadline: Deadline) -> None:
    """Check the cases that are to be timed and were not yet; small tensors many at a time, large ones few."""
    wanted = [case for case in wanted if case not in run.right]
    before = len(run.report.checks)
    large = [case for case in wanted if case.elements > LARGE_ELEMENTS]
    small = [case for case in wanted if case.elements <= LARGE_ELEMENTS]
    done = 0
    for group, most in ((large, FEW_JOBS), (small, None)):
        tasks = [
            Task(speed.ready, (case, run.candidate, str(run.device), with_compile and _beside_compile(run, case)))
            for case in group
        ]
        for task, checks in run.pool.checked(tasks, deadline, most):
            done += 1
            run.report.check(checks)
            if all(check.passed for check in checks):
                run.right.add(task.arguments[0])
    run.report.line(f"checked {done} of {len(wanted)} cases that are to be timed")
    run.report.check_table(before)


def half(deadline: Deadline) -> Deadline:
    return Deadline(deadline.left_s / 2)


def to_time(run: Run, wanted: Sequence[Case]) -> list[Case]:
    wrong = {check.case for check in run.report.failed}
    for case in wanted:
        if str(case) in wrong:
            run.report.line(f"{case}: WRONG, so not timed")
    return [case for case in wanted if case in run.right]


def layers(run: Run, deadline: Deadline) -> None:
    run.report.heading("Layers of ResNet-50, training, device time")
    copy_gb_per_s, wanted = _copy_gb_per_s(run), speed.layer_cases(run.cuda, run.quick)
    make_right(run, wanted, True, half(deadline))
    right, timed_cases = to_time(run, wanted), 0
    for case in right:
        if deadline.passed:
            break
        timed_cases += 1
        backend = candidates.native_backend(timed(case), run.device)
        plan = candidates.plan_words(timed(case), run.device)
        run.report.line(f"{case} ({case.tensor_bytes / 1e6:.0f} MB), native runs {backend}; {plan}")
        arms = speed.arms_of(case, run.candidate, with_compile=_beside_compile(run, case))
        for one in speed.time_case(case, run.device, run.clock, arms, run.rounds, deadline):
            run.report.timed(one)
            run.target(str(case), speed.targets(one, run.candidate, copy_gb_per_s))
            run.report.line(printed.layer_line(one, run.candidate, copy_gb_per_s))
    if timed_cases < len(wanted):
        run.report.note(f"layers: {len(wanted) - timed_cases} of {len(wanted)} cases, wrong or for lack of time")
    if run.clock.host_bound:
        run.report.line(f"in {run.clock.host_bound} of {run.clock.samples} samples the device waited for the host")


def small(run: Run, deadline: Deadline) -> None:
    run.report.heading("Small tensors, forward and backward: the device's time, the host's, and a step's in a loop")
    shapes = speed.SMALL_SHAPES if run.cuda else speed.SMALL_SHAPES[:1]
    wanted = [Case(shape, operation) for shape in shapes for operation in speed.AGAINST_EAGER]
    make_right(run, wanted, False, half(deadline))
    right, timed_cases = to_time(run, wanted), 0
    for case in right:
        if deadline.passed:
            break
        timed_cases += 1
        run.report.line(f"{case} ({case.tensor_bytes / 1e6:.2f} MB); {candidates.plan_words(timed(case), run.device)}")
        arms = speed.arms_of(case, run.candidate, with_compile=False)
        for one in speed.time_small(case, run.device, run.clock, arms, run.rounds, calls=50 if run.cuda else 5):
            run.report.timed(one)
            run.target(str(case), speed.targets(one, run.candidate, 1.0))
            run.report.line(printed.small_line(one, run.candidate))
    if timed_cases < len(wanted):
        run.report.note(f"small: {len(wanted) - timed_cases} of {len(wanted)} cases, wrong or for lack of time")


def resnet(run: Run, deadline: Deadline) -> None:
    run.report.heading("ResNet-50, a training step: channels_last, autocast to bf16")
    setting = resnets.Setting(256, 224, small=False) if run.cuda else resnets.Setting(4, 32, small=True)
    try:
        from bncli.engine import convert  # noqa: F401
    except ImportError as error:  # it needs what recipes need, and the rest of the benchmark does not
        run.report.note(f"ResNet-50: bncli.convert cannot be imported here: {error}")
        return
    if run.cuda:  # also so that each of its kernels is compiled, several at a time
        norms = resnets.norm_cases(setting)
        make_right(run, norms, False, half(deadline))
        wrong = [case for case in norms if str(case) in {check.case for check in run.report.failed}]
        if wrong:
            run.report.note(f"ResNet-50: {len(wrong)} of its batch norms are wrong, the first: {wrong[0]}")
            return
    check = resnets.gradients_agree(setting, run.candidate, run.device)
    run.report.check([check])
    run.report.line(f"gradients of batch {setting.batch}: {check.detail}")
    if not check.passed:
        run.report.note("ResNet-50: its gradients are wrong")
        return
    steps = resnets.measure(
        setting,
        run.candidate,
        run.device,
        run.clock,
        rounds=min(run.rounds, 15),
        with_compile=run.cuda,
        deadline=deadline,
    )
    run.report.record("resnet", samples_ms=steps.samples_ms, peak_bytes=steps.peak_bytes, failed=steps.failed)
    for name, reason in steps.failed.items():
        run.report.note(f"ResNet-50, {name}: {reason}")
    for name, samples in steps.samples_ms.items():
        peak = steps.peak_bytes[name]
        memory = "unknown" if peak is None else f"{peak / 2**30:.2f} GiB"
        ready = f"ready in {steps.warm_up_s[name]:.0f} s"
        run.report.line(f"{name:18} {printed.milliseconds(samples)} a step, peak memory {memory}, {ready}")
    run.target("ResNet-50", resnet_targets(steps, run.candidate))


def resnet_targets(steps: resnets.Steps, candidate: str) -> list[Target]:
    """Memory as native's over the candidate's, so that more is better there too."""
    found = []
    if candidate in steps.samples_ms and "native" in steps.samples_ms:
        found.append(
            Target("ResNet-50 step against eager", steps.over("native", candidate).median, resnets.STEP_TARGET)
        )
        memory = steps.memory_ratio("native", candidate)
        found.append(
            Target("ResNet-50 peak memory, native's over it", 1 / memory if memory else None, 1 / resnets.MEMORY_TARGET)
        )
    compiled = f"{candidate}, compiled"
    if compiled in steps.samples_ms and "native, compiled" in steps.samples_ms:
        found.append(Target("ResNet-50 step, both compiled", steps.over("native, compiled", compiled).median, 1.05))
    return found
