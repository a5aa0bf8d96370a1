"""Peaks of resident memory on a CPU, each in a process of its own. No torch here: its server may load it meanwhile.

The server has loaded torch and run next to nothing. It forks a child for each case, which runs a tiny case first, so
that neither lazily loaded code nor the heap's free pages count. A child that crashes or hangs costs its figure alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any

from bncli.results.profile import Case

HANG_S = 20.0  # of one case in its own process
START_S = 60.0  # to load torch in the server, on a busy machine
# Without the current folder on the path, which -c puts there: a torch.py in it must not be run.
SERVER = (
    "import sys; sys.path.remove(''); from bncli.measure.timing.memory_server import main; sys.exit(main(sys.argv[1:]))"
)


class FreshProcesses:
    """Peaks of resident memory on a CPU, each in a process of its own. Use it as a context: it ends its server.

    `failure` says why there is no figure, once one could not be had.
    """

    def __init__(self, allow_code: bool = False, hang_s: float = HANG_S) -> None:
        self._allow_code, self._hang_s = allow_code, hang_s
        self._server: subprocess.Popen[bytes] | None = None
        self._buffer, self._waited_for = b"", False
        self.failure: str | None = None
        if not (sys.platform == "linux" and hasattr(os, "fork")):
            self.failure = "the peak of resident memory is read on Linux only"

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def peak_mib(self, case: Case, kernel: str) -> float | None:
        """Of forward and backward beyond the inputs, in MiB; None where `failure` says why."""
        if self._server is None and self.failure is not None:
            return None  # it cannot be had here, or its server is gone
        self.failure = None
        try:
            server = self._ready()
            assert server.stdin is not None
            request = {"case": asdict(case), "kernel": kernel, "hang_s": self._hang_s}
            server.stdin.write(json.dumps(request).encode() + b"\n")
            server.stdin.flush()
            reply = self._reply(server, self._hang_s + 10.0)
        except (OSError, EOFError, TimeoutError) as error:
            self.failure = f"the process that measures memory ended: {error or type(error).__name__}"
            self.close()
            return None
        if "peak_mib" not in reply:
            self.failure = str(reply.get("failure"))
            return None
        peak: float | None = reply["peak_mib"]
        return peak

    def start(self) -> None:
        """Let the server load torch, and go on. Without it, the first peak is waited for longer."""
        if self._server is not None or self.failure is not None:
            return
        options = ["--allow-code"] if self._allow_code else []
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One thread, and no GPU: threads of either would not live on in a fork.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
            start_new_session=True,  # a Ctrl-C is for the program, which then ends the server
        )
        self._waited_for = False

    def _ready(self) -> subprocess.Popen[bytes]:
        self.start()
        if self._server is None:
            raise OSError("it could not be started")
        if not self._waited_for:
            self._reply(self._server, START_S)
            self._waited_for = True
        return self._server

    def _reply(self, server: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
        """The next line. Raises TimeoutError and EOFError."""
        assert server.stdout is not None
        end_s = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            if not select.select([server.stdout], [], [], max(0.0, end_s - time.monotonic()))[0]:
                raise TimeoutError("no answer")
            read = os.read(server.stdout.fileno(), 2**16)
            if not read:
                raise EOFError("it left")
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the server and what it has forked."""
        server, self._server = self._server, None
        if server is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(server.pid, signal.SIGKILL)  # its session is its own
        for stream in (server.stdin, server.stdout):
            _close(stream)
        server.wait()


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):  # what was written and not flushed has no reader any more
            stream.close()


def _path() -> str:
    return os.pathsep.join(entry for entry in sys.path if entry)
