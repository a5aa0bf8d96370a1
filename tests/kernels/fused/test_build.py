"""Compilation of a C++ file: once, for this processor, into a folder that nobody else can write, or refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from bncli.errors import Unavailable
from bncli.kernels.fused.build import library
from bncli.storage import locked

SOURCE = 'extern "C" int answer(void) { return ANSWER; }\n'


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
        file = tmp_path / "kernel.cpp"
        file.write_text(text)
        return file

    return write


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A compiler that is a script, whose calls are lines of a file."""

    def write(script: str = 'exec c++ "$@"') -> Path:
        log, program = tmp_path / "calls", tmp_path / "wrapped-c++"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        return log

    return write


def libraries(cache: Path) -> list[Path]:
    """The files in the cache, where there is a lock besides, and nothing else."""
    files = set(cache.iterdir()) - {cache / ".lock"}
    assert files == set(cache.glob("*.so"))
    return sorted(files)


def test_a_file_is_compiled_once_and_then_found_again_without_a_compiler(
    cache: Path, source: Callable[..., Path], compiler: Callable[..., Path]
) -> None:
    file, calls = source(), compiler()
    for _ in range(2):
        library.cache_clear()
        assert library(file, "ANSWER=41").answer() == 41
    (built,) = libraries(cache)
    assert len(calls.read_text().splitlines()) == 2  # compiled, linked
    assert (cache.stat().st_mode | built.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("change", ["definition", "source", "compiler", "processor"])
def test_another_source_definition_compiler_or_processor_is_another_file(
    change: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library(source(), "ANSWER=1")
    library.cache_clear()
    if change == "compiler":
        other = tmp_path / "other-c++"
        other.write_text('#!/bin/sh\nexec c++ "$@"\n')
        other.chmod(0o755)
        monkeypatch.setenv("CXX", str(other))
    if change == "processor":
        monkeypatch.setattr("bncli.kernels.fused.build._processor", lambda: "another one")
    text = SOURCE.replace("ANSWER", "1 + ANSWER") if change == "source" else SOURCE
    found = library(source(text), "ANSWER=2" if change == "definition" else "ANSWER=1")
    assert found.answer() == (2 if change in ("definition", "source") else 1)
    assert len(libraries(cache)) == 2


def test_processes_that_start_at_once_compile_once(
    cache: Path, source: Callable[..., Path], compiler: Callable[..., Path]
) -> None:
    calls = compiler()
    assert in_processes(10, source()) == [0] * 10
    assert len(calls.read_text().splitlines()) == 2
    assert len(libraries(cache)) == 1


def test_a_process_waits_for_another_that_compiles_but_not_for_ever(
    cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.kernels.fused.build.LONGEST_S", 0.1)
    cache.mkdir(mode=0o700)
    holder = locked(cache / ".lock")
    assert holder is not None
    with (
        holder,
        pytest.raises(Unavailable, match=r"another process had .*\.lock locked for 0 s.*Try again when it has ended"),
    ):
        library(source(), "ANSWER=1")


def test_a_compiler_that_takes_too_long_ends_with_all_its_processes_and_is_not_tried_again(
    cache: Path, source: Callable[..., Path], compiler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.kernels.fused.build.LONGEST_S", 2.0)
    calls = compiler(f'sleep 600 & echo $! > {cache.parent}/child; touch "$(mktemp)"; wait')
    monkeypatch.setenv("TMPDIR", str(cache.parent / "temporary"))
    (cache.parent / "temporary").mkdir()
    with pytest.raises(Unavailable, match=r"had not finished after 2 s. Try again when the machine is less busy"):
        library(source(), "ANSWER=1")
    assert len(calls.read_text().splitlines()) == 1
    assert libraries(cache) == list((cache.parent / "temporary").iterdir()) == []
    child, until = int((cache.parent / "child").read_text()), time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while (
            Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        ):  # of nobody who waits for it
            os.kill(child, 0)
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_a_killed_process_left_in_the_cache_is_deleted_by_the_next_that_compiles(
    cache: Path, source: Callable[..., Path]
) -> None:
    (cache / "build-1").mkdir(parents=True)
    cache.chmod(0o700)
    (cache / "build-1" / "kernel.o").touch()
    (cache / ".cpu.so.0123456789ab").touch()
    library(source(), "ANSWER=1")
    assert len(libraries(cache)) == 1


@pytest.mark.parametrize("refused", ["nothing", "-march=native", "libgomp"])
def test_the_first_flags_that_work_are_taken(
    refused: str,
    cache: Path,
    source: Callable[..., Path],
    compiler: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This processor's instructions if the compiler knows them; the OpenMP that torch runs on if it can be linked."""
    log = compiler(f'case "$*" in *{refused}*) exit 1;; esac\nexec c++ "$@"')
    monkeypatch.setattr("bncli.kernels.fused.build._openmp", lambda: ["-l:libgomp.so.1"])
    assert library(source(), "ANSWER=5").answer() == 5
    calls = log.read_text().splitlines()
    compiled, linked = ([call for call in calls if (" -c " in call) == wanted] for wanted in (True, False))
    assert len(compiled) >= 2 if refused == "-march=native" else len(compiled) == 1
    assert ["libgomp" in call for call in linked] == ([True, False] if refused == "libgomp" else [True])


@pytest.mark.parametrize(
    ("cxx", "told"),
    [
        ("", r"no C\+\+ compiler \(c\+\+, g\+\+.*apt install g\+\+.*name yours in CXX"),
        ("nonesuch-cc -m64", "no C\\+\\+ compiler 'nonesuch-cc', which the variable CXX names"),
        ('g++ "', "the variable CXX has a quotation mark without its second: g\\+\\+ "),
        ("''", "no C\\+\\+ compiler '', which the variable CXX names. Unset or correct CXX"),
        ("/", "no C\\+\\+ compiler '/', which the variable CXX names"),
    ],
)
def test_without_a_compiler_it_says_what_to_do(
    cxx: str, told: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(Unavailable, match=told):
        library(source(), "ANSWER=1")


def test_a_compiler_may_have_options_and_none_is_the_usual_one(
    cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cxx, answer in (("", 1), ("c++ -DANSWER=3", 3)):
        monkeypatch.setenv("CXX", cxx)
        assert library(source(), *["ANSWER=1"] * (not cxx)).answer() == answer


@pytest.mark.parametrize("script", ["exit 0", "kill -9 $$", "printf 'e\\351rror' >&2; exit 1"])
def test_a_compiler_that_does_not_do_its_work_is_refused(
    script: str, cache: Path, source: Callable[..., Path], compiler: Callable[..., Path]
) -> None:
    compiler(script)
    with pytest.raises(Unavailable, match="compiler"):
        library(source(), "ANSWER=1")
    assert libraries(cache) == []


def test_what_the_compiler_says_is_passed_on_in_a_line_and_nothing_is_left(
    cache: Path, source: Callable[..., Path]
) -> None:
    with pytest.raises(Unavailable, match=r"could not build it: .*kernel\.cpp:1:.*error: ") as error:
        library(source('extern "C" int answer(void) { return nonsense; }\n'))
    assert "\n" not in str(error.value)
    assert libraries(cache) == []


# --- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["the folder", "one above it"])
@pytest.mark.parametrize("foreign", ["mode", "owner"])
def test_a_folder_that_others_can_write_or_replace_is_refused(
    which: str, foreign: str, cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    changed = cache if which == "the folder" else cache.parent
    if foreign == "mode":
        changed.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(changed, 1, -1)
    elif which == "the folder":
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    else:
        pytest.skip("only root can give a folder to somebody else")
    told = "can be written by others; chmod" if foreign == "mode" else "belongs to another user"
    with pytest.raises(Unavailable, match=rf"{changed} {told}.*name one in BNCLI_CACHE"):
        library(source(), "ANSWER=1")


def test_a_folder_in_one_that_all_can_write_will_do_where_only_owners_can_rename(
    cache: Path, source: Callable[..., Path]
) -> None:
    cache.parent.chmod(0o1777)
    assert library(source(), "ANSWER=1").answer() == 1


def test_a_folder_from_which_no_code_can_be_loaded_is_refused_with_what_helps(
    cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(Unavailable, match=r"mounted with noexec.*name one in BNCLI_CACHE"):
        library(source(), "ANSWER=1")


def test_the_home_folder_is_found_and_another_is_taken_where_it_cannot_be_used(
    cache: Path, source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = cache.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "temporary"))
    places = [("~/mine", "mine"), (None, ".cache/bncli"), (None, f"temporary/bncli-{os.getuid()}")]
    for number, (named, place) in enumerate(places):
        monkeypatch.setenv("BNCLI_CACHE", named) if named else monkeypatch.delenv("BNCLI_CACHE")
        library(source(), f"ANSWER={number}")
        assert len(libraries(home / place)) == 1
        if place.startswith("."):
            (home / place).chmod(0o770)
            monkeypatch.setenv("BNCLI_CACHE", "")
    monkeypatch.setenv("BNCLI_CACHE", "~nobody-of-that-name/x")
    with pytest.raises(Unavailable, match="~nobody-of-that-name/x: its user is unknown"):
        library(source(), "ANSWER=9")


# --- the files ----------------------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_file_is_found_before_it_is_loaded_and_compiled_again(
    cache: Path, source: Callable[..., Path], compiler: Callable[..., Path]
) -> None:
    calls = compiler()
    assert in_processes(1, source()) == [0]
    (built,) = libraries(cache)
    content, other = built.read_bytes(), cache.parent / "other.so"
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 0xFF
    cases: dict[str, Callable[[], object]] = {
        "truncated": lambda: built.write_bytes(content[: len(content) // 2]),
        "flipped": lambda: built.write_bytes(flipped),
        "empty": lambda: built.write_bytes(b""),
        "text": lambda: built.write_bytes(b"no library"),
        "huge": lambda: os.truncate(built, 1 << 40),
        "writable": lambda: built.chmod(0o666),
        "link": lambda: (other.write_bytes(content), other.chmod(0o666), built.unlink(), built.symlink_to(other)),
        "pipe": lambda: (built.unlink(), os.mkfifo(built)),
    }
    if os.getuid() == 0:
        cases["of another user"] = lambda: os.chown(built, 1, -1)
    for number, (case, damage) in enumerate(cases.items(), 2):
        damage()
        assert in_processes(1, source()) == [0], case
        assert (libraries(cache), built.read_bytes(), built.is_symlink()) == ([built], content, False), case
        assert len(calls.read_text().splitlines()) == 2 * number, case
    assert other.read_bytes() == content


def test_a_folder_in_the_place_of_a_file_is_named(cache: Path, source: Callable[..., Path]) -> None:
    assert in_processes(1, source()) == [0]
    (built,) = libraries(cache)
    built.unlink()
    built.mkdir()
    with pytest.raises(Unavailable, match=rf"cannot be kept or loaded .*directory.*{built}.*mend that"):
        library(source(), "ANSWER=7")
