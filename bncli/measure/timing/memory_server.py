"""The process that `fresh_processes.FreshProcesses` forks from: a line of JSON in for each case, a line of JSON out."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bncli.measure.profile import candidates
from bncli.measure.reference import case as cases
from bncli.measure.timing import memory
from bncli.results.profile import Case

M_MMAP_THRESHOLD = -3  # mallopt's, of glibc
MAPPED_BYTES = 2**16  # from this size on a tensor has pages of its own, which are given back when it is freed


def main(arguments: Sequence[str]) -> int:
    """Answer requests until there are no more of them."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a kernel prints is no answer
    torch.set_num_threads(1)
    run_tiny(Case((2, 2), dtype="fp32"), "native", allow_code=False)  # 0.3 s the first time, which no child need wait
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        os.write(out, json.dumps(in_a_child(json.loads(line), "--allow-code" in arguments)).encode() + b"\n")
    return 0


def in_a_child(request: dict[str, Any], allow_code: bool) -> dict[str, Any]:
    """What a child of this process says of one case, or how it ended. It ends itself when it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, request["hang_s"])
            os.write(writer, json.dumps(measured(request, allow_code)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0 and said:
        found: dict[str, Any] = json.loads(said)
        return found
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return {"failure": f"it took longer than {request['hang_s']:g} s"}
    return {"failure": f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"}


def measured(request: dict[str, Any], allow_code: bool) -> dict[str, Any]:
    """The peak of one case, in the process that calls it; or the error of the kernel."""
    fields = request["case"]
    case = Case(**{**fields, "shape": tuple(fields["shape"])})
    try:
        source = run_tiny(memory.tiny(case), request["kernel"], allow_code)
        step = source(cases.timed(case)).step(memory.empty_inputs(case))
        _give_back_free_pages()
        return {"peak_mib": memory.resident_peak_mib(step)}
    except Exception as error:  # the kernel's; it has no figure
        return {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def run_tiny(case: Case, kernel: str, allow_code: bool) -> candidates.Source:
    """One step of a kernel on one thread, so that whatever it loads or compiles is there. Where its arms come from."""
    source = candidates.sources([kernel], torch.device("cpu"), allow_code)[kernel]
    source(cases.timed(case)).step(memory.empty_inputs(case))()
    return source


def _give_back_free_pages() -> None:
    """So that a small tensor takes new pages and not the heap's; glibc alone has such a call."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.malloc_trim(0)
