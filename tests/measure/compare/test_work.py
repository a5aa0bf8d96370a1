"""Runs that are handed out one by one or together."""

from __future__ import annotations

from bncli.measure.compare.plan import Job
from bncli.measure.compare.work import MOST_TOGETHER, Work


def jobs(company: str, count: int) -> list[Job]:
    return [Job(f"{company or 'alone'}{n}", "plain", {}, n, "tune", None, company=company) for n in range(count)]  # type: ignore[arg-type]


def sizes(work: Work, workers: int) -> list[int]:
    """Of all that workers take at once."""
    return [len(taken) for _ in range(workers) if (taken := work.take(workers))]


def test_runs_that_train_together_are_shared_by_the_workers() -> None:
    assert sizes(Work(jobs("a", 48)), 2) == [24, 24]
    assert sizes(Work(jobs("a", 5)), 2) == [3, 2]
    assert sizes(Work(jobs("a", 500)), 2) == [MOST_TOGETHER] * 2


def test_runs_of_other_company_and_those_that_train_alone_are_not_mixed() -> None:
    work = Work(jobs("a", 3) + jobs("", 2) + jobs("b", 2))
    assert [[job.key for job in work.take(1)] for _ in range(4)] == [
        ["a0", "a1", "a2"],
        ["alone0"],
        ["alone1"],
        ["b0", "b1"],
    ]
    assert not work.more


def test_the_runs_that_a_worker_died_with_are_tried_one_by_one() -> None:
    work = Work(jobs("a", 3))
    work.put_back(work.take(1), one_by_one=True)
    assert [job.key for job in work.waiting] == ["a0", "a1", "a2"]
    assert sizes(work, 1) == [1]
    assert list(work.running) == ["a0"]
