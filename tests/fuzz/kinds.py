"""What is fuzzed: each kind's good files, how one input is tried, and how aimed inputs are made.

A kind is a function of the folder in which its files are: it writes what its attempts need and returns a Kind. Adding
one is a function and a row of KINDS.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
import typer

from bncli.cli import PARSER_ERROR, app
from bncli.cli.console import print_result, show_plan
from bncli.engine import data as engine_data
from bncli.engine.data.splits import Dataset
from bncli.engine.train import checkpoint, train
from bncli.engine.train.weights import load_model
from bncli.errors import BncliError, UsageError
from bncli.kernels.fused import build
from bncli.measure.compare import reuse
from bncli.measure.compare.plan import named_runs, planned_comparison, study
from bncli.measure.dry_run import planned_training
from bncli.measure.profile import baseline, shapes
from bncli.recipe import npz as npz_header
from bncli.recipe import yaml
from bncli.recipe.load import Arm, Loaded, data_state, load
from bncli.recipe.sections import Npz, Recipe
from bncli.report.compare.folder import COMPARISON, ComparisonFolder
from bncli.report.files import event_line, to_json
from bncli.report.folder import RunFolder, signed
from bncli.report.profile import export
from bncli.report.profile.baseline import GateReport
from bncli.results.compare import Planned
from bncli.results.profile import KernelProfile, Profile, StepProfile
from bncli.results.train import RunStarted
from tests.fuzz import good
from tests.fuzz.guard import CONTROL
from tests.fuzz.mutate import mutated
from tests.measure.compare.conftest import ARMS, BASE, result
from tests.report import made_up_costs


@dataclass(frozen=True)
class Kind:
    """attempt: raises BncliError for an input that is refused. make: an aimed input, beside byte mutations.

    trees: good plain trees, which hypothesis changes, and `written` writes as a file. libraries: contents of those that
    may be loaded. compiles: whether it may start a compiler.
    """

    good: Sequence[bytes]
    attempt: Callable[[bytes], None]
    words: Sequence[bytes] = ()
    make: Callable[[Random], bytes] | None = None
    trees: Sequence[Any] = ()
    written: Callable[[Any], bytes] = lambda tree: json.dumps(tree).encode()
    libraries: Sequence[bytes] = ()
    compiles: bool = False


COMMANDS = typer.main.get_command(app)


class PrintedControl(Exception):
    """A control character of an input that reaches the terminal."""


def command(*arguments: str) -> None:
    """Run a command of bncli in this process. What it prints is looked through; what it refuses is raised."""
    sys.argv = ["bncli", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            COMMANDS.main(list(arguments), prog_name="bncli", standalone_mode=False)
        except PARSER_ERROR as error:
            raise UsageError(error.format_message()) from error
    for printed in (out.getvalue(), err.getvalue()):
        if found := CONTROL.search(printed):
            raise PrintedControl(repr(printed[max(0, found.start() - 100) : found.end() + 20]))


# --- recipes ------------------------------------------------------------------------------------------------------


def recipes(folder: Path) -> Kind:
    (folder / "good.npz").write_bytes(good.npzs()[0])
    texts = [text.encode() for text in good.RECIPES]
    shipped = sorted(Path(__file__).parents[2].joinpath("recipes").glob("*.yaml"))

    def attempt(data: bytes) -> None:
        (folder / "in.yaml").write_bytes(data)
        plan(load("in.yaml"))

    short = [file.read_bytes() for file in shipped if file.stat().st_size < 1200]
    trees = [yaml.parse(text.decode(), "good").root for text in texts]
    return Kind([*texts * 3, *short], attempt, trees=trees, written=lambda tree: written_as_yaml(tree))


def written_as_yaml(tree: Any) -> bytes:
    try:
        return yaml.dump(tree).encode()
    except Exception:  # surrogates and the like, which YAML cannot hold
        return json.dumps(tree).encode()


def plan(loaded: Loaded) -> None:
    """What a dry run does with a recipe, but for the checks that worker processes make."""
    data_state(loaded.base)
    show(planned_training(loaded, Arm(loaded.name, loaded.base)))
    if len(loaded.arms) > 1 and loaded.base.train.target is not None:
        show(planned_comparison(study([loaded], good.IDENTITY), loaded))


def show(planned: Planned) -> None:
    """Print a dry run's plan as the commands do, in both forms."""
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show_plan(planned, as_json)
        if found := CONTROL.search(out.getvalue()):
            raise PrintedControl(repr(out.getvalue()[max(0, found.start() - 100) : found.end() + 20]))


def sets(folder: Path) -> Kind:
    texts = [text.encode() for text in good.SETS]
    (folder / "base.yaml").write_text(BASE + ARMS)

    def attempt(data: bytes) -> None:
        plan(load("base.yaml", data.decode(errors="surrogateescape").split("\n"), sets_from="--set"))

    fields = yaml.parse(good.RECIPES[3], "good").where
    words = [yaml.dotted(keys).encode() for keys in fields if all(isinstance(key, str) for key in keys)]
    return Kind(texts, attempt, words=[*words, b"=", b".", b"arms.", b"grid."])


# --- data ---------------------------------------------------------------------------------------------------------


class _Evil:
    """Pickled, it makes a folder as soon as it is read back."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("/tmp/the-canary",)


PICKLE = pickle.dumps(_Evil())
HEADERS = (
    b"'descr': '<f4'", b"'descr': '|O'", b"'descr': '<c8'", b"'descr': '>f8'", b"'descr': '<f2'", b"'descr': '<U4'",
    b"'descr': '<M8[s]'", b"'descr': [('a', '<f4'), ('b', '|O')]", b"'descr': '|V0'", b"'descr': '|S0'",
    b"'descr': 'f4,f4'",
    b"'shape': (12, 4)", b"'shape': (-1, 4)", b"'shape': (9999999999, 9999)", b"'shape': (2**62, 4)", b"'shape': (12,)",
    b"'shape': ()", b"'shape': (0, 4)", b"'shape': (True, 48)", b"'shape': 48",
    b"'fortran_order': True", b"'fortran_order': 1",
    b"__import__('os').mkdir('/tmp/the-canary')", b"(" * 300, b"{" * 90, b"'x': 1", b"\x93NUMPY\x02\x00",
    b"\x93NUMPY\x09\x00",
)  # fmt: skip


def npzs(folder: Path) -> Kind:
    files = good.npzs()
    parts = [good.members(file) for file in files]

    def attempt(data: bytes) -> None:
        (folder / "in.npz").write_bytes(data)
        refused: list[BncliError] = []
        for held_out in (None, 4):
            try:
                npz_header.header("in.npz")
                engine_data.load(Npz(source="npz", path="in.npz", held_out=held_out), torch.device("cpu"))
            except BncliError as error:
                refused.append(error)
        if len(refused) == 2:
            raise refused[0]

    def make(random: Random) -> bytes:
        """An archive whose checksums are right, with one part changed, added, doubled or left out."""
        found = list(random.choice(parts).items())
        at = random.randrange(len(found))
        name, content = found[at]
        action = random.randrange(6)
        if action == 0:
            found.append((random.choice(("x.npy", "x", "y", "../x.npy", "/x.npy", "x.npy\x00", "z.npy", "?")), PICKLE))
        elif action == 1:
            found[at] = (name, content[:10] + PICKLE)
        elif action == 2:
            found[at] = (random.choice((name.removesuffix(".npy"), "y.npy", "x.npy", "X.npy", "labels.npy")), content)
        else:
            found[at] = (name, mutated(random, [content, *random.choice(parts).values()], HEADERS))
        compression = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        return good.archived(found, compression)

    return Kind(files, attempt, words=[PICKLE, *HEADERS], make=make)


# --- profiles -----------------------------------------------------------------------------------------------------


def csvs(folder: Path) -> Kind:
    def attempt(data: bytes) -> None:
        (folder / "in.csv").write_bytes(data)
        shapes.chosen("in.csv", (), None, cuda=False)

    words = [b"n,c,spatial,calls\n", b"shape,calls\n", b",", b'"', b"\n", b"7x7", b"1x1x1"]
    return Kind([text.encode() for text in (*good.CSVS[:2], good.CSVS[3])], attempt, words=words)


def typed_shapes(folder: Path) -> Kind:
    def attempt(data: bytes) -> None:
        shapes.chosen(None, [data.decode(errors="surrogateescape")], None, cuda=False)

    return Kind([text.encode() for text in good.SHAPES], attempt, words=[b"x", b"X", b"xx"])


def baselines(folder: Path) -> Kind:
    now: dict[type, Profile] = {
        KernelProfile: made_up_costs.kernel_profile(),
        StepProfile: made_up_costs.step_profile(),
    }
    files = good.baselines()

    def attempt(data: bytes) -> None:
        (folder / "in.json").write_bytes(data)
        earlier = export.load(Path("in.json"))
        mine = now[type(earlier)]
        gate = baseline.gate(mine, earlier, 1.1)
        export.to_markdown(mine, gate)
        export.to_json(mine, gate)
        with contextlib.redirect_stdout(io.StringIO()):
            print_result(GateReport(gate, mine, earlier))

    return Kind(files, attempt, trees=good.trees(files))


# --- comparisons --------------------------------------------------------------------------------------------------

FORMS = ((), ("--json",), ("--csv",), ("--markdown",), ("--latex",))


def report(saved: str, data: bytes) -> None:
    """`compare --from` in one of its forms, which the input decides."""
    command("compare", "--from", saved, *FORMS[zlib.crc32(data) % len(FORMS)])


def saved_comparisons(folder: Path) -> Kind:
    files = good.saved_comparisons(folder)

    def attempt(data: bytes) -> None:
        (folder / "in.json").write_bytes(data)
        report("in.json", data)

    return Kind(files, attempt, trees=good.trees(files))


def file_of_comparison(folder: Path, place: str) -> Kind:
    """A whole comparison with one file changed: a record, the plan or the answer; it is opened as `compare` does."""
    asked = good.asked(folder)
    good.write_comparison(folder / "all", asked)
    file = min((folder / "all").glob(place))
    content = file.read_bytes()
    if file.name != COMPARISON:  # then the answer would be the report, where the runs do not say more
        (folder / "all" / COMPARISON).unlink()
    jobs = named_runs(asked, {}).jobs

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(BncliError):
            report("all", data)
        try:
            with ComparisonFolder(Path("all")) as opened:
                kept = opened.finished({key for job in jobs for key in (job.key, job.recipe_key)})
                opened.failed()
                reuse.not_reused(jobs, kept, asked.identity)
                planned_comparison(asked, loaded, reuse.usable(kept))
        finally:
            file.write_bytes(content)

    loaded, unsigned = load(str(folder / "asked.yaml")), good.unsigned(content)
    return Kind([content, unsigned, unsigned], attempt, trees=good.trees([unsigned]))


def file_of_run(folder: Path, name: str) -> Kind:
    """A whole folder of `bncli train` with one file changed; it is written over as with --force."""
    recipe = signed(yaml.dump({"model": {"kind": "mlp"}}))
    started = event_line(RunStarted("x", "cpu", 3, 10, 4, None)) + "\n"
    files = {"recipe.yaml": recipe, "metrics.jsonl": started, "result.json": to_json(result(120))}
    (folder / "run").mkdir()

    def attempt(data: bytes) -> None:
        for each, text in files.items():
            (folder / "run" / each).write_text(text)
        (folder / "run" / name).write_bytes(data)
        with RunFolder(Path("run"), "x", overwrite=True) as opened:
            opened.begin("a: 1\n")

    contents = [files[name].encode()]
    if name == "result.json":
        contents.append(good.unsigned(contents[0]))
    return Kind(contents, attempt, trees=good.trees(contents[1:]))


# --- what training leaves -----------------------------------------------------------------------------------------


def trained(folder: Path, **options: Any) -> tuple[Recipe, Dataset, dict[str, bytes]]:
    """A short run: its recipe, its data, and the last content of each file that it saves."""
    (folder / "run.yaml").write_text(good.TRAINED)
    recipe, saved = load(str(folder / "run.yaml")).base, dict[str, bytes]()
    dataset = engine_data.load(recipe.data, torch.device("cpu"))
    save = {name: partial(saved.__setitem__, name) for name in ("checkpoint", "model")}
    stop = iter([False] * 4 + [True] * 99).__next__ if options.get("stopped") else lambda: False
    for _ in train(recipe, "cpu", dataset=dataset, threads=1, save=save, stop=stop):
        pass
    return recipe, dataset, saved


def checkpoints(folder: Path) -> Kind:
    recipe, dataset, saved = trained(folder, stopped=True)
    content = saved["checkpoint"]
    head = checkpoint.START

    def attempt(data: bytes) -> None:
        for _ in train(recipe, "cpu", dataset=dataset, threads=1, checkpoint=data):
            pass

    def signed_again(body: bytes) -> bytes:
        return checkpoint.FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    def make(random: Random) -> bytes:
        """One whose digest and checksums are right, with another pickle or other tensors."""
        parts = list(good.members(content[head:]).items())
        at = random.choice(
            [n for n, (name, _) in enumerate(parts) if name.endswith("data.pkl")] * 3 + [*range(len(parts))]
        )
        name, inside = parts[at]
        changed = mutated(random, [inside, *good.members(content[head:]).values()], OPCODES)
        parts[at] = name, random.choice((changed, changed, changed, PICKLE, pickle.dumps(_Evil(), 2)))
        return signed_again(good.archived(parts, random.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))))

    return Kind([content], attempt, make=make, trees=[checkpoint.unpacked(content)], written=checkpoint.packed)


# Of pickles: a global, a call, an object by its state, a number of many digits, a reference to nothing.
OPCODES = (
    PICKLE, b"cos\nmkdir\n", b"cbuiltins\nexec\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"R", b"b", b"\x81", b"(t", b"}", b"]", b"N", b"0", b"2", b"h\xff", b"j\xff\xff\xff\xff", b"\x8a\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8c\x04", b"X\xff\xff\xff\x7f", b"Q", b"P1\n", b".", b"ctorch\nload\n", b"ctorch\nFloatStorage\n",
)  # fmt: skip


def models(folder: Path) -> Kind:
    _, _, saved = trained(folder)
    with_code = json.dumps({"kind": "module", "module": "the_canary:make", "arguments": {}})
    (folder / "the_canary.py").write_text("import os\nos.mkdir('/tmp/the-canary')\n")

    def attempt(data: bytes) -> None:
        (folder / "in.safetensors").write_bytes(data)
        model = load_model("in.safetensors")
        model(torch.zeros(2, 8))

    size = 8 + int.from_bytes(saved["model"][:8], "little")
    header = json.loads(saved["model"][8:size])
    about = {name: text if name in ("bncli", "version", "format") else json.loads(text)
             for name, text in header["__metadata__"].items()}  # fmt: skip

    def written(tree: Any) -> bytes:
        """The file with other metadata, whose values are text."""
        tree = tree if isinstance(tree, dict) else {"tree": tree}
        plain = {str(name): each if isinstance(each, str) else json.dumps(each) for name, each in tree.items()}
        text = json.dumps({**header, "__metadata__": plain}).encode(errors="replace")
        return len(text).to_bytes(8, "little") + text + saved["model"][size:]

    def make(random: Random) -> bytes:
        """A header that is changed, with its right length."""
        text = mutated(random, [saved["model"][8:size]], WORDS_OF_TENSORS)
        return len(text).to_bytes(8, "little") + text + saved["model"][size:]

    trees = [about, {**about, "recipe": {**about["recipe"], "model": json.loads(with_code)}}]
    return Kind([saved["model"]], attempt, make=make, trees=trees, written=written)


WORDS_OF_TENSORS = (
    b"F16", b"BF16", b"F64", b"I64", b"BOOL", b"F8_E4M3", b"C64", b"[0,4]", b"[4,0]", b"[]", b"[9999999999,9999999999]",
    b"[-1]",
    b"the_canary:make", b'"module"', b"data_offsets", b"__metadata__",
)  # fmt: skip


# --- the compile cache --------------------------------------------------------------------------------------------

CPP_SOURCE = 'extern "C" int answer(void) { return 42; }\n'


def cached_libraries(folder: Path) -> Kind:
    """A small library in the cache, changed; the compiler is a stand-in that copies one that was compiled before."""
    source, cache = folder / "small.cpp", folder / "cache"
    source.write_text(CPP_SOURCE)
    cache.mkdir(mode=0o700)
    subprocess.run([*build.compiler(), "-shared", "-fPIC", str(source), "-o", str(folder / "made.so")], check=True)
    compiler = folder / "cc"
    compiler.write_text(
        f'#!/bin/sh\nfor last; do [ "$before" = -o ] && cp {folder}/made.so "$last"; before=$last; done\n'
    )
    compiler.chmod(0o755)

    def library() -> None:
        build.library.cache_clear()
        with mock.patch.dict(os.environ, BNCLI_CACHE=str(cache), CXX=str(compiler)):
            assert build.library(source).answer() == 42

    library()
    [built] = cache.glob("*.so")
    content = built.read_bytes()

    def attempt(data: bytes) -> None:
        built.unlink()  # the one that is loaded must not change under this process
        built.write_bytes(data)
        library()

    return Kind([content], attempt, libraries=(content,), compiles=True)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "recipe": recipes,
    "set": sets,
    "npz": npzs,
    "shapes-csv": csvs,
    "shape": typed_shapes,
    "baseline": baselines,
    "from": saved_comparisons,
    "run-record": lambda folder: file_of_comparison(folder, "runs/*.json"),
    "plan": lambda folder: file_of_comparison(folder, "plan.json"),
    "answer": lambda folder: file_of_comparison(folder, "comparison.json"),
    "run-result": lambda folder: file_of_run(folder, "result.json"),
    "run-metrics": lambda folder: file_of_run(folder, "metrics.jsonl"),
    "run-recipe": lambda folder: file_of_run(folder, "recipe.yaml"),
    "checkpoint": checkpoints,
    "safetensors": models,
    "cache": cached_libraries,
}
