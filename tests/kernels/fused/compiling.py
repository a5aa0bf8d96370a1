"""Compile one Triton kernel for a GPU that is not here, in this process or in a worker.

Triton compiles to a cubin without a driver, and its wheel carries the disassembler. Workers are processes of their own,
because Triton cannot compile where its interpreter is on (TRITON_INTERPRET=1, as the kernels' own tests have it), and
because a compiler that crashes must end one result, not the run. This module does not import Triton before it compiles.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernels.fused import machine_code
from tests.kernels.fused.machine_code import MachineCode

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Named:
    """A constant by its name, as Named("triton.language:float32"), where Triton must not be imported yet."""

    reference: str


@dataclass(frozen=True)
class Specialisation:
    """One kernel with the types, constants and alignments that one compilation is for."""

    name: str
    function: Any  # a @triton.jit function, or "module:name" of one
    signature: Mapping[str, str]  # every argument in order: {"x": "*bf16", "n": "i32", "K": "constexpr"}
    constants: Mapping[str, object]  # plain values, data types, other Triton functions, or Named ones
    divisible_by_16: frozenset[str] = frozenset()  # in bytes for pointers; at a launch Triton finds it out by itself
    num_warps: int = 4
    num_ctas: int = 1
    cooperative: bool = False  # launched as one resident grid: it may wait for other programs
    maxnreg: int | None = None
    fp_fusion: bool = True  # a product and a sum in one rounding
    vector_bits: Mapping[str, int] = field(default_factory=dict)  # argument -> the least width of an access through it

    @classmethod
    def of(cls, given: Any) -> Specialisation:
        """From any object that has some of these attributes."""
        if isinstance(given, cls):
            return given
        return cls(
            **{one.name: getattr(given, one.name) for one in dataclasses.fields(cls) if hasattr(given, one.name)}
        )

    @property
    def stratum(self) -> tuple[str, ...]:
        """Which kernel it is, for what data types."""
        types = [f"{name}:{kind}" for name, kind in self.signature.items() if kind.startswith("*")]
        types += [str(value) for value in self.constants.values() if type(value).__name__ in ("dtype", "Named")]
        return (reference(self.function), *types)


def reference(function: Any) -> str:
    """ "module:name" of a Triton function, compiled or interpreted."""
    return function if isinstance(function, str) else f"{function.fn.__module__}:{function.fn.__qualname__}"


def resolve(name: str) -> Any:
    """What "module:name" refers to."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def compile_for(specialisation: Specialisation, capability: int, ptx_version: int | None = None) -> MachineCode:
    """Compile for sm_<capability> and read the cubin. Raises what Triton raises, or RuntimeError under its interpreter.

    ptx_version: 86 for PTX 8.6, an older one than the wheel's assembler knows, as a driver may need it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = specialisation.function
    function = resolve(function) if isinstance(function, str) else function
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError(f"{specialisation.name}: not a compiled Triton function; TRITON_INTERPRET must be unset")
    names = list(specialisation.signature)
    constants = {
        (names.index(name),): resolve(value.reference) if isinstance(value, Named) else value
        for name, value in specialisation.constants.items()
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(specialisation.divisible_by_16)}
    options = {
        "num_warps": specialisation.num_warps,
        "num_ctas": specialisation.num_ctas,
        "maxnreg": specialisation.maxnreg,
        "launch_cooperative_grid": specialisation.cooperative,
        "enable_fp_fusion": specialisation.fp_fusion,
        "ptx_version": ptx_version,
    }
    start = time.perf_counter()
    kernel = triton.compile(
        ASTSource(function, dict(specialisation.signature), constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in options.items() if value is not None},
    )
    seconds = time.perf_counter() - start
    return machine_code.read(
        listing=_disassembled(kernel.asm["cubin"]),
        ptx=kernel.asm["ptx"],
        arguments={name: kind for name, kind in specialisation.signature.items() if kind != "constexpr"},
        shared_bytes=kernel.metadata.shared,
        seconds=seconds,
    )


def _disassembled(cubin: bytes) -> str:
    """cuobjdump's listing, from Triton's cache where it is there: it takes as long as a small compilation."""
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    known = cache.get_file("listing.txt")
    if known:
        return Path(known).read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cache.put(listing, "listing.txt", binary=False)
    return listing


# --- workers --------------------------------------------------------------------------------------------------------


class _ByReference(pickle.Pickler):
    """Triton functions travel by name: the worker imports its own, compiled ones."""

    def reducer_override(self, value: Any) -> Any:
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            return resolve, (reference(value),)
        return NotImplemented


def _line(message: Any) -> bytes:
    buffer = io.BytesIO()
    _ByReference(buffer).dump(message)
    return base64.b64encode(buffer.getvalue()) + b"\n"


@dataclass(frozen=True)
class Compiled:
    """A worker's answer: the machine code, or why there is none; and the version of Triton, if known."""

    code: MachineCode | None
    failure: str
    triton: str


class Worker:
    """A process that compiles, started when first needed and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, specialisation: Specialisation, capability: int) -> Compiled:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(_line((specialisation, capability)))
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            return pickle.loads(base64.b64decode(answer))
        status = process.wait()
        self.stop()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return Compiled(None, f"the compiler's process ended with {how}", "")

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "tests.kernels.fused.compiling"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def stop(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()  # a worker ends at the end of its input
            self._process.wait()
            self._process = None


def work() -> None:
    """Answer the jobs on standard input, one line each, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin.buffer:
        code, failure = None, ""
        try:
            specialisation, capability = pickle.loads(base64.b64decode(line))
            code = compile_for(specialisation, capability)
        except Exception as error:
            failure = _reason(error)
        answers.write(_line(Compiled(code, failure, _version())))
        answers.flush()


def _reason(error: BaseException) -> str:
    """Where and what, on one line. Triton quotes the source up to a caret, and says last what went wrong in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    carets = [at for at, line in enumerate(lines) if line.strip() == "^"]
    lines = [lines[0], *lines[carets[-1] + 1 :]] if carets else lines
    return f"{type(error).__name__}: {' '.join(' '.join(lines).split())}"


def _version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return ""


if __name__ == "__main__":
    from tests.kernels.fused import compiling  # under its own name, by which its classes travel

    compiling.work()
