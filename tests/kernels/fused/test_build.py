"""Compilation of a C file: once, for this processor, into a folder that nobody else can write, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from bncli.errors import Unavailable
from bncli.kernels.fused.build import library

SOURCE = "int answer(void) { return ANSWER; }\n"


def compile_and_ask(file: Path) -> None:
    library.cache_clear()
    assert library(file, "ANSWER=7").answer() == 7


def in_processes(count: int, file: Path) -> list[int | None]:
    """Exit codes of processes that compile at once."""
    processes = [get_context("fork").Process(target=compile_and_ask, args=(file,)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BNCLI_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = SOURCE) -> Path:
        file = tmp_path / "kernel.c"
        file.write_text(text)
        return file

    return write


def test_a_file_is_compiled_once_and_then_found_again_without_a_compiler(
    cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = source()
    assert library(file, "ANSWER=41").answer() == 41
    (built,) = cache.iterdir()
    written = built.stat().st_mtime_ns
    library.cache_clear()
    monkeypatch.setattr("bncli.kernels.fused.build._compile", None)
    assert library(file, "ANSWER=41").answer() == 41
    assert built.stat().st_mtime_ns == written
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("change", ["definition", "source", "compiler", "processor"])
def test_another_source_definition_compiler_or_processor_is_another_file(
    change: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library(source(), "ANSWER=1")
    library.cache_clear()
    if change == "compiler":
        other = tmp_path / "other-cc"
        other.write_text('#!/bin/sh\nexec cc "$@"\n')
        other.chmod(0o755)
        monkeypatch.setenv("CC", str(other))
    if change == "processor":
        monkeypatch.setattr("bncli.kernels.fused.build._processor", lambda: "another one")
    text = SOURCE.replace("ANSWER", "1 + ANSWER") if change == "source" else SOURCE
    found = library(source(text), "ANSWER=2" if change == "definition" else "ANSWER=1")
    assert found.answer() == (2 if change in ("definition", "source") else 1)
    assert len(list(cache.iterdir())) == 2


def test_processes_that_compile_at_once_do_each_other_no_harm(cache: Path, source: Callable[..., Path]) -> None:
    assert in_processes(3, source()) == [0, 0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".so"]  # nothing half made is left


@pytest.mark.parametrize("refused", ["nothing", "-march=native", "libgomp"])
def test_the_first_flags_that_work_are_taken(
    refused: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This processor's instructions if the compiler knows them; the OpenMP that torch runs on if it can be linked."""
    log, wrapped = tmp_path / "log", tmp_path / "wrapped-cc"
    wrapped.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{refused}*) exit 1;; esac\nexec cc "$@"\n')
    wrapped.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapped))
    monkeypatch.setattr("bncli.kernels.fused.build._openmp", lambda: ["-l:libgomp.so.1"])
    assert library(source(), "ANSWER=5").answer() == 5
    calls = log.read_text().splitlines()
    compiled, linked = ([call for call in calls if (" -c " in call) == wanted] for wanted in (True, False))
    assert len(compiled) >= 2 if refused == "-march=native" else len(compiled) == 1
    assert ["libgomp" in call for call in linked] == ([True, False] if refused == "libgomp" else [True])


@pytest.mark.parametrize(
    ("cc", "told"),
    [
        ("", r"no C compiler \(cc, gcc.*apt install gcc.*name yours in CC"),
        ("nonesuch-cc -m64", "no C compiler nonesuch-cc, which the variable CC names"),
    ],
)
def test_without_a_compiler_it_says_what_to_do(
    cc: str, told: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", cc)
    with pytest.raises(Unavailable, match=told):
        library(source(), "ANSWER=1")


def test_what_the_compiler_says_is_passed_on_in_a_line_and_nothing_is_left(
    cache: Path, source: Callable[..., Path]
) -> None:
    with pytest.raises(Unavailable, match=r"could not build it: .*kernel\.c:1:.*error: ") as error:
        library(source("int answer(void) { return nonsense; }\n"))
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("foreign", ["mode", "owner"])
def test_a_folder_that_others_can_write_is_refused(
    foreign: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    if foreign == "mode":
        cache.chmod(0o777)
    else:
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(Unavailable, match="can be written by others: chmod 700 it, or name another"):
        library(source(), "ANSWER=1")


def test_a_damaged_file_is_named_with_what_to_do(cache: Path, source: Callable[..., Path]) -> None:
    assert in_processes(1, source()) == [0]
    (built,) = cache.iterdir()
    built.write_bytes(b"no library")
    with pytest.raises(Unavailable, match="Delete that file to compile it again"):
        library(source(), "ANSWER=7")
