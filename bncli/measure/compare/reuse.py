"""Reuse of runs of earlier calls: the identity that a run depends on besides its recipe, and its changes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from bncli import __version__
from bncli.engine.user_code import digest_of
from bncli.errors import BncliError
from bncli.measure.compare.plan import Job, Study, collect, known_runs, named_runs
from bncli.recipe.load import Arm, data_state, digest
from bncli.recipe.sections import Recipe
from bncli.results.compare import BegunComparison, Comparison, Note, RunRecord

PACKAGE = Path(__file__).parents[2]
IDENTITY = ("bncli", "torch", "device", "data")  # the parts of a run's identity, as `identity` gives them
RUN_BY = ("engine", "kernels", "recipe")  # the parts of bncli that decide what a run does


def identity(device: str, recipe: Recipe) -> dict[str, str]:
    """What a run's key depends on besides its recipe: a change of any part makes a new run."""
    torch = importlib.metadata.version("torch")
    without_gpu = torch.endswith("+cpu") or (sys.platform == "linux" and not list(Path("/dev").glob("nvidia[0-9]*")))
    kind = "cpu" if device == "auto" and without_gpu else device.partition(":")[0]
    sources = f"{__version__} {sources_digest(PACKAGE)}"
    return {"bncli": sources, "torch": torch, "device": kind, "data": digest(data_state(recipe))}


def sources_digest(package: Path) -> str:
    """A short name for the contents of bncli's own engine, kernels and recipe."""
    found = hashlib.sha256()
    files = (file for part in RUN_BY for file in (package / part).rglob("*") if file.suffix in (".py", ".cpp"))
    for file in sorted(files):
        found.update(f"{file.relative_to(package).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return found.hexdigest()[:20]


def usable(kept: Iterable[RunRecord]) -> dict[str, RunRecord]:
    """Key -> the latest run with that key whose model code on disk is unchanged."""
    records = sorted(kept, key=_date)
    now = {file: digest_of(file) for record in records for file in record.code}
    return {record.key: record for record in records if record.code.items() <= now.items()}


def not_reused(jobs: Iterable[Job], kept: Iterable[RunRecord], identity: Mapping[str, str]) -> list[Note]:
    """A note of how many of the jobs were done by earlier runs that cannot be used, and why, if there are any."""
    keys, earlier = usable(kept), {record.recipe_key: record for record in sorted(kept, key=_date)}
    lost = {job.key: earlier[job.recipe_key] for job in jobs if job.key not in keys and job.recipe_key in earlier}
    # The first part that is another now; the user's own code is compared file by file.
    parts = ([each for each in IDENTITY if record.identity.get(each) != identity.get(each)] for record in lost.values())
    changed = Counter(next(iter(each), "code") for each in parts)
    return [Note.of("not reused", runs=len(lost), changed=dict(changed.most_common()))] if changed else []


def _date(record: RunRecord) -> str:
    return record.result.environment.date if record.result else ""


def of_one_code(kept: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs that loaded the same versions of the user's files as the latest runs that loaded them."""
    records, latest = sorted(kept, key=_date), dict[str, str]()
    for record in records:
        latest |= record.code
    return [record for record in records if record.code.items() <= latest.items()]


def report_of_runs(
    begun: BegunComparison, finished: Callable[[set[str]], list[RunRecord]], failed: Collection[RunRecord]
) -> Comparison:
    """The result from the runs that exist so far, without running anything. finished: those with some keys that ended.

    Raises BncliError.
    """
    from bncli.measure.compare.summary import summarise  # imports scipy, which a dry run does without

    plan = begun.plan
    try:
        arms = [Arm(name, Recipe.model_validate(plan.recipes[name]), plan.fixed.get(name, ())) for name in plan.arms]
    except (KeyError, ValueError) as error:
        raise BncliError("its recipes are not as this bncli has them; run compare again with the recipe") from error
    study = Study(plan, tuple(arms), begun.identity)
    kept, records = list[RunRecord](), dict[str, RunRecord]()

    def find(keys: set[str]) -> dict[str, RunRecord]:
        kept.extend(finished(keys))
        return {record.key: record for record in (*failed, *of_one_code(kept))}

    known_runs(study, records, find)
    records = find(set())  # of one code, now that all are read
    return summarise(plan, collect(study, records), named_runs(study, records).planned, begun.threads)


def says_more(made: Comparison, answer: Comparison) -> bool:
    """Whether a report holds runs that ended, or were done again by other code, and that the answer does not hold."""
    held = {run.key: (run.code, run.given_up) for run in answer.runs}
    return any(held.get(run.key) != (run.code, run.given_up) for run in made.runs if run.result is not None)
