"""A whole comparison beside hand-written loops: `python -m tests.benchmarks.comparison [recipe] [--repeats N]`.

One side is `bncli compare` in an empty folder, with its default jobs. The other is one Python process that trains all
runs of the same plan one after another, also those that compare gives up: every tuning run of every arm, and the
further runs of the points that compare kept. Its loop is what one writes by hand: data in memory, torch.nn,
torch.optim, one thread, or all where a trial says that they are faster by 5 %. Like compare, it evaluates accuracy and
loss at the recipe's steps, and ends a run once its steps to all targets are settled. Both sides are timed from the
start of their processes to the end, in turns. Before that, some runs of the hand-written loop are held to the steps to
target of bncli's `train`, which starts from the same weights and takes the same batches.

Printed: wall and CPU time of both sides; the ratio of their wall times, which is in each round the product of three
ratios, of run-steps (what racing saves), of CPU time for a run-step (what batching saves) and of cores in use (what
processes save); the ratio for each run-step that was trained; and seconds of start-up, which all of these include. The
target is a ratio of 5 for recipes/digits.yaml on 2 cores; with --quick, a smaller plan only shows that all this works.
On a machine that is in use, the ratio of wall times says little; the ratios of run-steps and of CPU time still hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bncli.engine import data
from bncli.engine.data.splits import Dataset, InMemory
from bncli.engine.models import build
from bncli.engine.models.init import stream
from bncli.engine.models.norms import BatchNorm
from bncli.engine.target import StepsToTarget, evaluation_steps
from bncli.recipe.load import load, plain
from bncli.recipe.sections import Recipe
from bncli.results.train import Evaluation, Target

ROOT = Path(__file__).parent.parent.parent
LOOPS = [sys.executable, "-c", "from tests.benchmarks.comparison import loops_process; loops_process()"]
CPU = torch.device("cpu")
BY_ITSELF = ("reached", "budget", "diverged")  # statuses of runs that went on to their end
BY_HAND, COMPARE = "hand-written loops", "bncli compare"


@dataclass(frozen=True)
class Outcome:
    """Of one run: the optimizer steps that it made, and its steps to each target, None for a miss."""

    steps_run: int
    steps_to_targets: tuple[float | None, ...]


@dataclass(frozen=True)
class Side:
    """One side of the benchmark, once. before_s, after_s: wall time before its first run and after its last one."""

    wall_s: float
    cpu_s: float
    run_steps: int
    before_s: float
    after_s: float

    @property
    def training_s(self) -> float:
        return self.wall_s - self.before_s - self.after_s

    @property
    def cores(self) -> float:
        return self.cpu_s / self.wall_s

    @property
    def cpu_us_per_step(self) -> float:
        return 1e6 * self.cpu_s / self.run_steps


# --- the hand-written loop --------------------------------------------------------------------------------------------


def network(recipe: Recipe, dataset: Dataset) -> nn.Sequential:
    """A flat Sequential of torch's modules with bncli's initial weights, for a model that is a chain of layers."""
    layers = [layer for layer in build(recipe, dataset.shape, dataset.classes).modules() if not any(layer.children())]
    for place, norm in enumerate(layers):
        if isinstance(norm, BatchNorm):
            kind = nn.BatchNorm1d if len(dataset.shape) == 1 else nn.BatchNorm2d
            layers[place] = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
            layers[place].load_state_dict(norm.state_dict())
    return nn.Sequential(*layers)


def tensors(split: Any) -> tuple[Tensor, Tensor]:
    """All examples of a split in memory, as the model takes them: x (N, *shape), y (N,)."""
    assert isinstance(split, InMemory)
    return split.x if split.convert is None else split.convert(split.x), split.y


def batches(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled epochs, without the last, incomplete batch of each."""
    while True:
        for index in torch.randperm(len(x), generator=generator)[: len(x) - len(x) % size].split(size):
            yield x.index_select(0, index), y.index_select(0, index)


@torch.inference_mode()
def accuracy_and_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    model.eval()
    logits = model(x)
    found = (logits.argmax(1) == y).sum().item() / len(y), F.cross_entropy(logits, y).item()
    model.train()
    return found


def train_by_hand(recipe: Recipe, dataset: Dataset) -> Outcome:
    """One run: until the steps to all targets are settled, the budget, or a loss that is not finite."""
    options, target = recipe.train, recipe.train.target
    assert target is not None
    targets = [StepsToTarget(Target(target.metric, value)) for value in (target.value, *target.also)]
    model = network(recipe, dataset)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer.kind]
    optimizer = kind(model.parameters(), **recipe.optimizer.model_dump(exclude={"kind", "weight_decay_on"}))
    held_out = tensors(dataset.held_out)
    coming = batches(*tensors(dataset.train), options.batch_size, stream(options.seed, "order"))
    step, loss = 0, torch.zeros(())
    for evaluated in (0, *evaluation_steps(options.evaluate_every, options.steps)):
        while step < evaluated:
            x, y = next(coming)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if not math.isfinite(loss.item()):
            break
        found = Evaluation(step, *accuracy_and_loss(model, *held_out), None)
        settled = [each.add(found) for each in targets]
        if all(settled) and options.stop_at_target:
            break
    return Outcome(step, tuple(each.steps for each in targets))


def loops_process() -> None:
    """What the process of the hand-written loops does: recipes come as JSON, and outcomes and their seconds go back."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    torch.optim.SGD([nn.Parameter(torch.zeros(1))]).zero_grad()  # imports torch._dynamo, as any optimizer's does first
    recipes = [Recipe.model_validate(recipe) for recipe in asked["recipes"]]
    dataset = data.load(recipes[0].data, CPU)
    began = time.perf_counter()
    runs = [train_by_hand(recipe, dataset) for recipe in recipes]
    seconds = time.perf_counter() - began
    json.dump({"seconds": seconds, "runs": [[run.steps_run, run.steps_to_targets] for run in runs]}, sys.stdout)


# --- both sides, each from the start of its processes to the end ------------------------------------------------------


def children_cpu_s() -> float:
    """CPU seconds of the processes that were waited for, and of those that they started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_hand(recipes: Sequence[Recipe], threads: int) -> tuple[Side, list[Outcome]]:
    """All runs one after another in one process."""
    asked = json.dumps({"threads": threads, "recipes": [plain(recipe) for recipe in recipes]})
    cpu, began = children_cpu_s(), time.perf_counter()
    ended = subprocess.run(LOOPS, cwd=ROOT, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu = time.perf_counter() - began, children_cpu_s() - cpu
    answer = json.loads(ended.stdout)
    runs = [Outcome(steps, tuple(to_targets)) for steps, to_targets in answer["runs"]]
    return Side(wall, cpu, sum(run.steps_run for run in runs), wall - answer["seconds"], 0.0), runs


def compared(recipe: str, sets: Sequence[str], folder: Path) -> Side:
    """`bncli compare` in a folder that is not there yet; its answer and its runs are in it then."""
    command = [sys.executable, "-m", "bncli", "compare", recipe, "--out", str(folder), "--quiet"]
    command += [word for each in sets for word in ("--set", each)]
    cpu, began, first = children_cpu_s(), time.time(), None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if first is None and (folder / "plan.json").exists():  # written once a worker has made a first step
                first = time.time()
            time.sleep(0.02 if first else 0.002)
    wall, cpu = time.time() - began, children_cpu_s() - cpu
    assert process.returncode == 0, f"{' '.join(command)} left with exit code {process.returncode}"
    files = list((folder / "runs").glob("*.json"))
    steps = sum(json.loads(file.read_text())["result"]["steps_run"] for file in files)
    last = max(file.stat().st_mtime for file in files)
    return Side(wall, cpu, steps, (first or began) - began, began + wall - last)


# --- the plan, and what is held to what -------------------------------------------------------------------------------


def quick_sets(recipe: str) -> list[str]:
    """Overrides that leave at most two values of each list of the grid, and few seeds."""
    lists = load(recipe).file.grid.items()
    return [
        "seeds={tune: 3, report: 2}",
        *(f"grid.{path}={json.dumps(values[1:3] or values)}" for path, values in lists),
    ]


def planned(recipe: str, sets: Sequence[str], kept: Mapping[str, list[dict[str, Any]]]) -> dict[str, Recipe]:
    """The key of its recipe -> each run of a comparison. kept: arm -> points with further runs; all, where missing."""
    from bncli.measure.compare.plan import study  # which the hand-written loops do without

    asked = study([load(recipe, sets)])
    if asked.plan.largest_learning_rate:
        raise SystemExit(f"{recipe}: the hand-written loops do not search for the largest learning rate")
    jobs = []
    for arm in asked.arms:
        points = asked.points(arm)
        jobs += asked.jobs(arm, "tune", points) + asked.jobs(arm, "report", kept.get(arm.name) or points)
    return {job.recipe_key: job.recipe for job in jobs}


def trained(recipe: Recipe, dataset: Dataset) -> Outcome:
    """The same run by bncli's `train`."""
    from bncli.engine.train import train
    from bncli.results.serialize import to_plain

    *_, last = train(recipe, "cpu", dataset=dataset, threads=1)
    return outcome(to_plain(last)["result"])


def outcome(result: dict[str, Any]) -> Outcome:
    """Of a RunResult as plain data."""
    return Outcome(result["steps_run"], (result["steps_to_target"], *(each["steps"] for each in result["also"])))


def check_loop(runs: Sequence[Recipe]) -> str:
    """How many runs have the steps to target of bncli's `train`, in words. Raises SystemExit if not all have."""
    dataset, threads = data.load(runs[0].data, CPU), torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = [(train_by_hand(run, dataset), trained(run, dataset)) for run in runs]
    torch.set_num_threads(threads)
    equal = sum(hand.steps_to_targets == ours.steps_to_targets for hand, ours in pairs)
    words = f"steps to all targets equal to those of bncli's train in {equal} of {len(runs)} runs"
    if equal < len(runs):
        raise SystemExit(f"{words}: the hand-written loop does not train this recipe, so times would not be comparable")
    return words


def trial(runs: Sequence[Recipe], rounds: int) -> tuple[int, str]:
    """How many threads the hand-written loop should have, and why: one, or all where that is faster by 5 %.

    Only with one thread, as in compare, are its runs the same bits as compare's.
    """
    most = torch.get_num_threads()
    seconds = {1: math.inf, most: math.inf}
    for threads in list(seconds) * rounds:
        side, _ = by_hand(runs, threads)
        seconds[threads] = min(seconds[threads], side.wall_s - side.before_s)
    tried = ", ".join(f"{each:.2f} s with {threads}" for threads, each in seconds.items())
    return most if seconds[most] < 0.95 * seconds[1] else 1, f"by a trial: {tried}"


def agreement(answer: dict[str, Any], hand: Mapping[str, Outcome]) -> str:
    """How compare's runs (its answer as plain data) ended, and how many have the steps of the hand-written loops."""
    results = {run["recipe_key"]: run["result"] for run in answer["runs"] if run["result"]}
    statuses = Counter(result["status"] for result in results.values())
    mine = {key: result for key, result in results.items() if key in hand}  # not those that measure costs
    ended = {key: outcome(result) for key, result in mine.items() if result["status"] in BY_ITSELF}
    equal = sum(found.steps_to_targets == hand[key].steps_to_targets for key, found in ended.items())
    words = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    return f"compare's runs: {words}; steps to all targets equal to the loops' in {equal} of {len(ended)} not given up"


# --- printed ----------------------------------------------------------------------------------------------------------


def parts(hand: Side, ours: Side) -> dict[str, float]:
    """The ratio of wall times, and the three that it is the product of."""
    return {
        "wall time": hand.wall_s / ours.wall_s,
        "run-steps": hand.run_steps / ours.run_steps,
        "CPU time for a run-step": hand.cpu_us_per_step / ours.cpu_us_per_step,
        "cores in use": ours.cores / hand.cores,
    }


def middle(values: Sequence[float], form: str) -> str:
    """The median with the least and the largest."""
    return f"{median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def show(rounds: Sequence[tuple[Side, Side]]) -> None:
    """rounds: the hand-written loops and compare, once each."""
    print(f"\n{'median [least, largest]':20} {'wall s':>22} {'CPU s':>22} {'cores':>6} {'run-steps':>10} "
          f"{'us CPU a step':>14} {'s before, after':>16}")  # fmt: skip
    for name, sides in zip((BY_HAND, COMPARE), zip(*rounds, strict=True), strict=True):
        before, after = (median(getattr(side, name) for side in sides) for name in ("before_s", "after_s"))
        print(f"{name:23} {middle([s.wall_s for s in sides], '.1f'):>19} {middle([s.cpu_s for s in sides], '.1f'):>22} "
              f"{median(s.cores for s in sides):6.2f} {median(s.run_steps for s in sides):10,.0f} "
              f"{median(s.cpu_us_per_step for s in sides):14.0f} {before:9.1f}, {after:.1f}")  # fmt: skip
    found = [parts(*both) for both in rounds]
    ratios = {name: middle([each[name] for each in found], ".2f") for name in found[0]}
    print(f"\n{BY_HAND} / {COMPARE}: wall time {ratios.pop('wall time')}x  (target: at least 5)")
    by = ("by racing", "by batching", "by processes: compare's over the loops'")
    for (name, ratio), lever in zip(ratios.items(), by, strict=True):
        print(f"  {'=' if name == 'run-steps' else 'x'} {name} {ratio}x  ({lever})")
    hand, ours = rounds[-1]
    saved = hand.run_steps - ours.run_steps
    print(f"run-steps saved: {saved:,} of {hand.run_steps:,}, {saved / hand.run_steps:.1%}")
    each = [one["wall time"] / one["run-steps"] for one in found]
    print(f"wall time for each run-step that was trained: {middle(each, '.2f')}x")
    without = [hand.training_s / ours.training_s for hand, ours in rounds]
    print(f"wall time without what is before the first run and after the last: {middle(without, '.2f')}x")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/digits.yaml")
    parser.add_argument("--repeats", type=int, metavar="N", help="of both sides, in turns; default 2, 1 with --quick")
    parser.add_argument("--threads", type=int, metavar="N", help="of the hand-written loops, without a trial")
    parser.add_argument("--quick", action="store_true", help="fewer points of the grid and fewer seeds")
    options = parser.parse_args(arguments)
    recipe, quick = options.recipe, options.quick
    sets = quick_sets(recipe) if quick else []
    every = list(planned(recipe, sets, {}).values())
    some = every[:: math.ceil(len(every) / (4 if quick else 8))]
    print(f"{recipe} on {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{BY_HAND}: {check_loop(some)}", flush=True)
    threads, why = (options.threads, "as asked") if options.threads else trial(some, rounds=1 if quick else 5)
    print(f"{BY_HAND}: threads: {threads}, {why}", flush=True)
    rounds = list[tuple[Side, Side]]()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.repeats or (1 if quick else 2)):
            folder = Path(scratch) / str(number)
            ours = compared(recipe, sets, folder)
            answer = json.loads((folder / "comparison.json").read_text())
            kept = {arm["arm"]: [each["point"] for each in arm["tuning"] if each["kept"]] for arm in answer["arms"]}
            runs = planned(recipe, sets, kept)
            hand, outcomes = by_hand(list(runs.values()), threads)
            rounds.append((hand, ours))
            print(f"round {number + 1}, {len(runs)} runs: {hand.wall_s:.1f} s by hand, {ours.wall_s:.1f} s by compare, "
                  f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
            print(f"  {agreement(answer, dict(zip(runs, outcomes, strict=True)))}", flush=True)
    show(rounds)


if __name__ == "__main__":
    main()
