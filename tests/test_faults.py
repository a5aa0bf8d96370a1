"""Faults of files, options, the environment, streams and limits: a sentence, an exit code of the table, no hang."""

from __future__ import annotations

import os
import resource
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bncli.measure.timing.fresh_process import FreshProcesses
from tests.faults import MIB, Call, prepare, run

OK, FAILED, USAGE, UNAVAILABLE, DIVERGED = 0, 1, 2, 3, 4
LONGEST_S = 60.0

LONG, DIGITS = "x" * 300, "9" * 4301
TRAIN = ("train", "small.yaml", "-o", "r", "-q")
COMPARE = ("compare", "small.yaml", "-o", "c", "-q")
GRADCHECK = ("gradcheck", "--quick", "--only", "hard/*", "-q")
PROFILE = ("profile", "--shape", "2x3", "--kernel", "native", "--time", "0.1", "-q")
NPZ = ("train", "small.yaml", "-q", "--set", "data={source: npz, path: a.npz, held_out: 3}")


def written(name: str, content: str | bytes) -> partial[object]:
    return partial(Path(name).write_bytes, content.encode() if isinstance(content, str) else content)


def folder(name: str, mode: int = 0o777) -> partial[object]:
    return partial(_folder, name, mode)


def _folder(name: str, mode: int) -> None:
    os.mkdir(name)
    os.chmod(name, mode)


def pipe(name: str) -> partial[None]:
    return partial(os.mkfifo, name)


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def deleted_folder() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(os.getcwd())


def newer_zip() -> None:
    """A .npz file that says that a later version of the format is needed to read it."""
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    content = bytearray(Path("a.npz").read_bytes())
    content[content.find(b"PK\x01\x02") + 6] = 200
    Path("a.npz").write_bytes(content)


def many_keys() -> None:
    with open("small.yaml", "a") as file:
        file.writelines(f"key{number}: 1\n" for number in range(9000))


def renamed(name: str) -> partial[None]:
    return partial(os.rename, "small.yaml", name)


# What, the call, and the exit codes that it may leave with.
QUICK: dict[str, tuple[Call, set[int]]] = {
    # --- recipes and overrides
    "text for a number": (Call(("train", "small.yaml", "-n", "--set", "model={kind: resnet, depth: twenty}")), {USAGE}),
    "no character": (Call(("train", "small.yaml", "--set", r'norm="\U00110000"')), {USAGE}),
    "half a character": (Call(("train", "small.yaml", "--set", r'data={source: npz, path: "\ud800"}')), {USAGE}),
    "4,301 digits": (Call(("train", "small.yaml", "--set", f"train.steps={DIGITS}")), {USAGE}),
    "a deep list": (Call(("train", "r.yaml"), written("r.yaml", "[" * 5000)), {USAGE}),
    "a deep path": (Call(("train", "small.yaml", "--set", f"{'a.' * 100_000}a=1")), {USAGE}),
    "9,000 unknown keys": (Call(("train", "small.yaml"), many_keys), {USAGE}),
    "a size beyond 64 bits": (Call((*TRAIN, "--set", "data.shape=[99999999, 99999999, 99999999]")), {USAGE}),
    "a rate beyond 32 bits": (Call((*TRAIN, "--set", "optimizer.lr=1e308")), {USAGE}),
    "a recipe that is a pipe": (Call(("train", "p"), pipe("p")), {USAGE}),
    "a recipe that never ends": (Call(("train", "/dev/zero")), {USAGE}),
    "a recipe that is a folder": (Call(("compare", ".")), {USAGE}),
    "a recipe without end on standard input": (Call(("train", "-"), streams={0: "/dev/zero"}), {USAGE}),
    "a recipe of a name too long": (Call(("profile", LONG)), {USAGE}),
    "a recipe that may not be read": (Call(("train", "f"), partial(os.mkdir, "f", 0), ordinary=True), {USAGE}),
    "a recipe called ...yaml": (Call(("train", "...yaml", "-q"), renamed("...yaml")), {OK}),
    "a recipe whose name is not UTF-8": (Call(("train", "a\udcff.yaml", "-n"), renamed("a\udcff.yaml")), {OK}),
    "load_recipe with a pipe": (Call(("p",), pipe("p"), api=True), {USAGE}),
    "load_recipe with a NUL": (Call(("a\0b",), api=True), {USAGE}),
    # --- data
    "a newer zip file": (Call(NPZ, newer_zip), {USAGE}),
    "data of a user that is not there": (Call((*NPZ[:-1], "data={source: npz, path: ~nobody-here/a.npz}")), {USAGE}),
    "data of a name too long": (Call((*NPZ[:-1], f"data={{source: npz, path: {LONG}}}")), {USAGE}),
    "data that are a pipe": (Call(NPZ, pipe("a.npz")), {USAGE}),
    "data in a closed folder": (Call((*NPZ[:-1], "data={source: npz, path: d/a.npz}"), folder("d", 0), ordinary=True),
                                {USAGE}),
    # --- other inputs
    "a saved comparison that is a pipe": (Call(("compare", "--from", "p"), pipe("p")), {USAGE}),
    "a saved comparison that never ends": (Call(("compare", "--from", "/dev/zero")), {USAGE}),
    "a saved comparison of a name too long": (Call(("compare", "--from", LONG)), {USAGE}),
    "a comparison in a closed folder": (Call(("compare", "--from", "d/x"), folder("d", 0), ordinary=True), {USAGE}),
    "a baseline that is a pipe": (Call(("profile", "--baseline", "p"), pipe("p")), {USAGE}),
    "a deep baseline": (Call(("profile", "--baseline", "b"),
                             written("b", f'{{"format_version": 2, "kind": "kernels", "rows": {deep(900)}}}')),
                        {USAGE}),
    "shapes that are a pipe": (Call(("profile", "--shapes", "p.csv"), pipe("p.csv")), {USAGE}),
    "a shape of 4,301 digits": (Call(("profile", "--shape", f"1x{DIGITS}")), {USAGE}),
    "calls of 4,301 digits": (Call(("profile", "--shapes", "a.csv"), written("a.csv", f"shape,calls\n2x3,{DIGITS}\n")),
                              {USAGE}),
    "an input of 4,301 digits": (Call(("profile", "--model", "a:b", "--allow-code", "--input", f"1x{DIGITS}")),
                                 {USAGE}),
    "a GPU of 4,301 digits": (Call(("gradcheck", "--device", f"cuda:{DIGITS}")), {USAGE}),
    # --- outputs
    "a report of a name too long": (Call((*GRADCHECK, "--html", f"{LONG}.html")), {USAGE}),
    "a plot of a name too long": (Call((*TRAIN, "--plot", f"{LONG}.svg")), {USAGE}),
    "a run's folder of a name too long": (Call(("train", "small.yaml", "-o", LONG)), {USAGE}),
    "a run's folder that is read-only": (Call(TRAIN, folder("r", 0o555), ordinary=True), {USAGE}),
    "a comparison's folder that is foreign": (Call(COMPARE, folder("c", 0o755), ordinary=True), {USAGE}),
    "a current folder that was deleted": (Call(("train", "../small.yaml", "-q"), deleted_folder), {USAGE}),
    # --- streams and limits
    "a full output": (Call((*TRAIN, "--json"), streams={1: "/dev/full"}), {FAILED}),
    "closed streams": (Call((*TRAIN, "--json"), streams={0: "closed", 1: "closed", 2: "closed"}), {OK}),
    "full messages": (Call(("train", "small.yaml"), streams={2: "/dev/full"}), {OK}),
    "full messages of a mistake": (Call(("train", "none.yaml"), streams={2: "/dev/full"}), {USAGE}),
    "an output in ASCII": (Call(("train", "--example", "digits"), encoding="ascii"), {OK}),
    "a terminal of no columns": (Call(("train", "small.yaml", "-q"), environment={"COLUMNS": "0"}), {OK}),
    "few files at a time": (Call(COMPARE, limits={resource.RLIMIT_NOFILE: 8}), {FAILED}),
    "short files": (Call(TRAIN, limits={resource.RLIMIT_FSIZE: 300}), {FAILED}),
    "little memory for a batch": (
        Call((*TRAIN, "--set=data.examples=40000", "--set=train.batch_size=20000", "--set=model.hidden=[4000]"),
             limits={resource.RLIMIT_AS: 200 * MIB}), {FAILED}),
    "little memory for the data": (Call((*TRAIN, "--set", "data.examples=100000000"),
                                        limits={resource.RLIMIT_AS: 200 * MIB}), {USAGE}),
}  # fmt: skip
FORMS = ("--json", "--csv", "--markdown", "--latex")
SLOW: dict[str, tuple[Call, set[int]]] = {
    **{f"profile {form} in {encoding}": (Call((*PROFILE, form), encoding=encoding), {OK})
       for encoding in ("ascii", "latin-1", "cp1252") for form in FORMS},
    **{f"gradcheck {form} in {encoding}": (Call((*GRADCHECK, form), encoding=encoding), {OK})
       for encoding in ("ascii", "latin-1") for form in FORMS},
    **{f"{arguments[0]} with {number} {name}": (Call(arguments, streams={number: name}),
                                                 {FAILED} if (number, name) == (1, "/dev/full") else {OK})
       for arguments in (TRAIN, COMPARE, GRADCHECK, PROFILE) for number in (0, 1, 2) for name in ("closed", "/dev/full")
       if number or name == "closed"},
    **{f"{arguments[0]} with {most} files at a time": (Call(arguments, limits={resource.RLIMIT_NOFILE: most}),
                                                         {OK, FAILED, USAGE})
       for arguments in (TRAIN, COMPARE, GRADCHECK, PROFILE) for most in (5, 6, 7, 8, 10, 14, 20)},
    **{f"{arguments[0]} with files of {most} bytes": (Call((*arguments, *more), limits={resource.RLIMIT_FSIZE: most}),
                                                        {OK, FAILED})
       for arguments, more in ((TRAIN, ("--plot", "x.svg")), (COMPARE, ("--html", "x.html")),
                               (GRADCHECK, ("--html", "x.html")))
       for most in (300, 1000, 5000, 20_000)},
    **{f"{arguments[0]} in a folder of mode {mode:o}": (Call((*arguments, *more), folder("d", mode), ordinary=True),
                                                          {USAGE})
       for mode in (0, 0o555, 0o755)
       for arguments, more in ((TRAIN[:2], ("-o", "d/r")), (COMPARE[:2], ("-o", "d/c")),
                               (GRADCHECK, ("--html", "d/x.html")), (TRAIN[:2], ("--plot", "d/x.svg")))},
    **{f"train with {name}={value[:9]!a}": (Call((*TRAIN, "--plot", "x.svg"), environment={name: value}), {OK, USAGE})
       for name, value in (("MPLBACKEND", "none"), ("MPLCONFIGDIR", "/proc/x"), ("TMPDIR", "/none"), ("HOME", "/proc"),
                           ("TERM", "none"), ("TZ", "None/Such"), ("LINES", DIGITS), ("OMP_NUM_THREADS", "x"))},
    **{f"a deep {kind} of {depth}": (call, {USAGE}) for depth in (100, 500, 900, 3000, 100_000) for kind, call in (
        ("comparison", Call(("compare", "--from", "a"),
                            written("a", f'{{"format_version": 3, "plan": {deep(depth)}}}'))),
        ("recipe", Call(("train", "a"), written("a", "- " * min(depth, 400_000) + "1"))),
        ("override", Call(("train", "small.yaml", "--set", f"a={'[' * depth}"))))},
}  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    made = FreshProcesses(prepare)
    yield made
    made.close()


@pytest.mark.parametrize(("call", "codes"), QUICK.values(), ids=QUICK)
def test_a_fault_has_its_sentence_and_its_exit_code(
    tmp_path: Path, processes: FreshProcesses, call: Call, codes: set[int]
) -> None:
    check(tmp_path, processes, call, codes)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "codes"), SLOW.values(), ids=SLOW)
def test_each_command_under_each_fault(tmp_path: Path, processes: FreshProcesses, call: Call, codes: set[int]) -> None:
    check(tmp_path, processes, call, codes)


def check(tmp_path: Path, processes: FreshProcesses, call: Call, codes: set[int]) -> None:
    tmp_path.chmod(0o777)
    code, out, err = processes.call(run, call, str(tmp_path), limit_s=LONGEST_S)  # CallFailed after that time
    for parent, _, _ in os.walk(tmp_path):
        os.chmod(parent, 0o777)  # so that it can be deleted
    assert "Traceback" not in err, err
    assert code in codes, (code, err)
    assert len(err) < 20_000
    said = [line for line in err.splitlines() if line.startswith("bncli: ")]
    if code and not call.streams.get(2):
        assert len(said) == 1, err
        assert len(err.splitlines()) < 60
    elif not code and not call.streams.get(1):
        assert out


def test_a_recipe_called_after_the_folder_above_runs_in_a_folder_of_its_own(
    tmp_path: Path, processes: FreshProcesses
) -> None:
    processes.call(run, Call(("train", "...yaml", "-q"), renamed("...yaml")), str(tmp_path), limit_s=LONGEST_S)
    assert len(list((tmp_path / "runs" / "recipe").iterdir())) == 1


def test_out_of_memory_names_the_batch_size_to_try(tmp_path: Path, processes: FreshProcesses) -> None:
    call, _ = QUICK["little memory for a batch"]
    _, _, err = processes.call(run, call, str(tmp_path), limit_s=LONGEST_S)
    assert "out of memory on cpu with 20000 examples at a time; try train.batch_size: 10000, or train.accumulate" in err
