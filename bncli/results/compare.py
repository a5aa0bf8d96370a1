"""`bncli compare`: events while it runs, its result, and what a dry run would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bncli.results.environment import COMPARISON_VERSION, Interval
from bncli.results.train import RunResult, Target, most_steps_to_target

# rate: of the search for the largest learning rate; cost: a short run alone, of an arm whose other runs train together
Phase = Literal["tune", "report", "rate", "cost"]
COST_STEPS = 500  # of a run of phase cost, at most
RATE = "optimizer.lr"  # the field of a run's point that a search for the largest learning rate changes


@dataclass(frozen=True)
class RunRecord:
    """One run of a comparison: what was asked, and its result or the reason why there is none."""

    key: str  # of the resolved recipe, the device and the versions: the name of the run's file
    arm: str
    point: dict[str, Any]  # dotted recipe field -> the value of the grid that this run used
    seed: int
    phase: Phase
    result: RunResult | None
    failure: str | None = None
    at_a_time: int | None = None  # runs in progress at once when it ended; above 1 they disturb its times
    recipe_key: str = ""  # of the resolved recipe alone: runs of one recipe have it in common
    identity: dict[str, str] = field(default_factory=dict)  # what the key depends on besides: versions, device, data
    code: dict[str, str] = field(default_factory=dict)  # the user's own that the run loaded: file -> SHA-256

    @property
    def given_up(self) -> bool:
        """Whether it was ended before its time, since its point of the grid could no longer win."""
        return self.result is not None and self.result.status == "given up"

    @property
    def compared(self) -> bool:
        """Whether it is one of those whose steps to the target are compared."""
        return self.phase in ("tune", "report")


@dataclass(frozen=True)
class Ratio:
    """The reference arm's steps over this arm's. `value` is None where the data allow only a bound."""

    value: float | None
    interval: Interval
    method: Literal["means", "medians", "bound", "hits", "same recipe", "none"]
    p_value: float | None  # two-sided; "means": of a ratio of 1; "hits": of equal shares of runs that hit
    holm_p_value: float | None = None  # the same after Holm's correction over all arms of the table


@dataclass(frozen=True)
class Steps:
    """Steps to target over seeds. `value` is the geometric mean, the median once a run is censored, None past half."""

    value: float | None
    interval: Interval
    method: Literal["geometric mean", "median", "bound"]


@dataclass(frozen=True)
class TuningCell:
    """One arm at one point of the grid, over the tuning seeds. kept: whether it got the further seeds too."""

    point: dict[str, Any]
    hits: int
    runs: int  # that ended by themselves
    steps: float | None  # geometric mean over the runs that hit; None without one
    diverged: int = 0
    kept: bool = False
    stopped_at: int | None = None  # the step at which runs were given up; None where none was


@dataclass(frozen=True)
class Choice:
    """How clear the choice of an arm's best grid point was."""

    points: int  # of the grid, for this arm
    kept: int  # of them, those that the tuning seeds did not tell from the best
    doubt: float | None  # share of the samples with one seed left out that choose another point


@dataclass(frozen=True)
class Cost:
    """Seconds or examples to target, by the same rules as steps, and their ratio to the reference arm's."""

    typical: Steps
    ratio: Ratio | None  # None for the reference


@dataclass(frozen=True)
class AtTarget:
    """One arm at a further target of the same runs, at its best point for that target among those kept."""

    target: Target
    hits: int
    runs: int
    steps: Steps
    ratio: Ratio | None  # None for the reference


@dataclass(frozen=True)
class ArmSummary:
    """One row of the comparison's table."""

    arm: str
    point: dict[str, Any]  # the best point of the grid; every figure of the row is of the runs there, all seeds
    fixed: tuple[str, ...]  # fields of the grid that the arm fixes and that were therefore not tuned
    at_edge: tuple[str, ...]  # fields whose best value is the first or the last of its list
    hits: int
    runs: int  # that ended by themselves (failed and interrupted ones are not counted)
    steps: Steps
    first_hit: float | None  # geometric mean of the raw first hits
    ratio: Ratio | None  # None for the reference arm
    best: float | None  # median over the runs of each one's best metric
    samples_per_s: float | None  # median
    ms_per_step: float | None  # median
    peak_memory_mib: float | None  # largest
    parameters: int | None
    diverged: int
    failures: tuple[str, ...]
    tuning: tuple[TuningCell, ...]
    curve: tuple[tuple[float, float, float, float], ...]  # step, median metric, lower and upper quartile over seeds
    choice: Choice | None = None  # None where nothing was tuned, or not all of it yet
    seconds: Cost | None = None  # of training alone; None where a time is unknown
    examples: Cost | None = None
    also: tuple[AtTarget, ...] = ()
    thinned: float | None = None  # the ratio from every second evaluation, a mean of both halves
    cores_lacked: float | None = None  # median


@dataclass(frozen=True)
class Claim:
    """A statement about two arms, as the recipe has it."""

    say: str
    measure: str  # of names.MEASURES
    arm: str
    over: str
    bound: float  # of the ratio arm / over, or of the difference arm - over
    side: Literal["at least", "at most"]
    bounded: bool  # whether the recipe states the bound; else it is that of no difference
    when: str
    layer: str | None


Verdict = Literal["shown", "refuted", "cannot tell"]


# Why a claim has no interval.
NoInterval = Literal[
    "no pairs", "one pair", "too few hits", "not positive", "unknown layer", "no common steps", "no common loss",
    "no rate trains", "no rate fails",
]  # fmt: skip


@dataclass(frozen=True)
class JudgedClaim(Claim):
    """A claim and what the runs say of it."""

    compared: Literal["ratio", "difference"]
    value: float | None
    interval: Interval  # at `level`
    level: float  # 1 - 0.05 / number of claims
    p_value: float | None  # two-sided, of the bound itself; not corrected
    verdict: Verdict
    seeds: int  # pairs of runs that the figures rest on
    of_seeds: int  # pairs that the plan has; the others failed, or lack a finite value
    seeds_needed: int | None = None  # that would decide it with probability 0.8, for a claim that cannot be told
    no_interval: NoInterval | None = None
    of_arm: float | None = None  # typical value of each arm: geometric mean of a ratio's, else mean
    of_over: float | None = None


NoteKind = Literal[
    "unfinished", "no hit", "at edge", "held before training", "few steps", "few evaluations", "failed", "diverged",
    "every second evaluation", "few seeds", "same recipe", "not told apart", "common seeds", "no interval", "hits",
    "arms differ", "machines", "runs at a time", "paper", "not reused", "earlier code", "earlier answer",
    "other threads", "disturbed", "words",
]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """What a reader must know before quoting the table. Its sentence is made in `report.compare.notes`."""

    kind: NoteKind  # "words": a sentence of an earlier format
    arm: str | None = None  # that it is about; None: all of them, or those in facts
    facts: dict[str, Any] = field(default_factory=dict)  # the numbers and names of its sentence, as plain JSON data

    @staticmethod
    def of(kind: NoteKind, arm: str | None = None, **facts: Any) -> Note:
        return Note(kind, arm, facts)


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison asked for, without the recipes themselves: enough to make the table again from the runs."""

    name: str
    arms: tuple[str, ...]
    fixed: dict[str, tuple[str, ...]]  # arm -> grid fields that it fixes
    grid: dict[str, tuple[Any, ...]]
    reference: str
    tune_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    target: Target
    budget: int
    data: str
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)  # arm -> its resolved recipe, as plain data
    also: tuple[Target, ...] = ()
    claims: tuple[Claim, ...] = ()
    largest_learning_rate: dict[str, Any] | None = None  # the recipe's section, as plain data
    full_grid: bool = False  # whether runs go on whose point of the grid can no longer win

    @property
    def most_steps(self) -> float:
        """The most steps to target that the budget can show; a run that misses took more."""
        return most_steps_to_target(self.budget)

    def budget_of(self, phase: Phase) -> int | None:
        """Optimizer steps of a run; None where the plan has no such run."""
        searched = (self.largest_learning_rate or {}).get("steps")
        return searched if phase == "rate" else min(self.budget, COST_STEPS) if phase == "cost" else self.budget


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison: the plan, a row for each arm, notes, and every run that it rests on."""

    plan: ComparisonPlan
    arms: tuple[ArmSummary, ...]
    notes: tuple[Note, ...]  # the most important first
    runs: tuple[RunRecord, ...]
    planned_runs: int
    format_version: int = COMPARISON_VERSION
    threads: int | None = None  # with which the cost columns were made; None: whatever each run had
    remarks: tuple[Note, ...] = ()  # those of the notes that say how it was made, which its runs do not tell
    claims: tuple[JudgedClaim, ...] = ()

    def results_by_seed(self, arm: ArmSummary) -> dict[int, RunResult]:
        """The runs that an arm's row rests on: those at its best point that ended by themselves."""
        mine = [run for run in self.runs if (run.arm, run.point) == (arm.arm, arm.point) and run.compared]
        return {run.seed: run.result for run in mine if run.result and run.result.status != "interrupted"}

    def results_of(self, arm: ArmSummary) -> list[RunResult]:
        return list(self.results_by_seed(arm).values())


@dataclass(frozen=True)
class BegunComparison:
    """What `compare` set out to do: with the files of its runs, enough to make the report after a kill."""

    plan: ComparisonPlan
    identity: dict[str, str]  # of its runs, as in RunRecord
    threads: int
    sources: tuple[str, ...]  # the recipes' files


# --- what happens while a comparison runs -------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonStarted:
    name: str
    planned: int
    done: int  # found on disk, made by an earlier call
    metric: str


@dataclass(frozen=True)
class RunBegan:
    worker: int
    label: str
    budget: int


@dataclass(frozen=True)
class RunProgressed:
    worker: int
    step: int
    value: float | None  # of the target's metric, of one of the runs; None before the first evaluation
    below: dict[str, float] = field(default_factory=dict)  # key -> a run's steps below its target so far


@dataclass(frozen=True)
class RunEnded:
    worker: int | None  # None: in another call on the same folder
    label: str
    done: int
    planned: int  # grows when an arm keeps several points of the grid
    record: RunRecord
    elsewhere: int = 0  # runs that other calls on the same folder are doing now


ComparisonEvent = ComparisonStarted | RunBegan | RunProgressed | RunEnded


# --- what would be done -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedArm:
    """One arm before it is trained. Sizes are None where only the user's own code could tell."""

    name: str
    changes: tuple[tuple[str, Any], ...]  # dotted field, value: what differs from the base
    fixed: tuple[str, ...]
    parameters: int | None
    memory_mib: float | None  # estimated: parameters, gradients, optimizer state, activations; without the framework
    tuning_runs: int
    report_runs: int
    alone: str | None = None  # the field for which a run of the arm trains alone; None: with others of the arm


@dataclass(frozen=True)
class MemoryNeeded:
    """Estimated memory on the CPU's side, in MiB. None where only the user's own code or a server could tell."""

    data_mib: float | None  # once
    shared: bool  # whether all processes have the data once, or each for itself
    process_mib: float  # of each, without any training
    training_mib: float | None  # of each, the largest
    jobs: int  # processes
    available_mib: float

    @property
    def fitting(self) -> int:
        """How many of the processes the available memory has room for; at least one, since these are estimates."""
        each, once = self._each_and_once
        return max(1, min(self.jobs, int((self.available_mib - once) // each)))

    @property
    def total_mib(self) -> float:
        """What is unknown counts as nothing."""
        each, once = self._each_and_once
        return self.jobs * each + once

    @property
    def _each_and_once(self) -> tuple[float, float]:
        each, data = self.process_mib + (self.training_mib or 0.0), self.data_mib or 0.0
        return (each, data) if self.shared else (each + data, 0.0)


@dataclass(frozen=True)
class Planned:
    """The outcome of a dry run. runs, steps_at_most: to be done, if each arm keeps a single point of the grid."""

    name: str
    fields: tuple[tuple[str, Any, str], ...]  # of the base run: dotted field, value, and where the value came from
    arms: tuple[PlannedArm, ...]
    grid: dict[str, tuple[Any, ...]]
    runs: int
    steps_at_most: int
    claims: tuple[Claim, ...] = ()
    search_runs: int = 0  # about, on top of `runs`: of the searches for the largest learning rate
    search_steps: int = 0  # of each of these runs
    done: int = 0  # of `runs`, in the folder already
    raced: bool = False  # whether points of the grid are given up that can no longer win
    open_choices: bool = False  # whether an arm may keep several points of the grid, and have more runs
    checked: bool = False  # whether the data were read and each model made its first step
    memory: MemoryNeeded | None = None
