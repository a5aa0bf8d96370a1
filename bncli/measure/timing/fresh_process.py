"""Function calls in fresh processes: a server that has loaded torch forks a child for each call.

A call starts from the memory of a process that has loaded a module and done almost nothing else, and a crash or hang
affects only that call. multiprocessing's fork server is not used: it only imports modules, while one step of batch norm
in the server saves each child 0.3 s; it is shared by the whole program with its standard error, and reruns the main
script in each child; and until Python 3.11 it has the current folder on its path. This module does not import torch, so
that the server and the program load it at the same time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_S = 60.0  # to load torch in the server, on a busy machine
# -c puts the current folder on the path, and a torch.py in it must not be loaded.
SERVER = (
    "import sys; sys.path.remove(''); from bncli.measure.timing.fresh_process import serve; serve(int(sys.argv[1]))"
)


class CallFailed(RuntimeError):
    """A call without a result: its exception, how its process ended, or a timeout."""


class FreshProcesses:
    """A server for calls in fresh processes, which `close` ends together with its children.

    prepare: a module's function without arguments, which the server runs first. What it imports, and its own
    module, is loaded in every child. The server has one thread and no GPU, since neither survives a fork.
    """

    def __init__(self, prepare: Callable[[], object], command: str = SERVER) -> None:
        self._prepare, self._command = prepare, command
        self._server: subprocess.Popen[bytes] | None = None
        self._connection, self._theirs = multiprocessing.Pipe()
        self._ended = ""  # how the server ended by itself

    def start(self) -> None:
        """Start the server in the background. Otherwise the first call starts it."""
        if self._server is not None:
            return
        if not hasattr(os, "fork"):
            raise CallFailed("processes cannot be forked on this system")
        with self._theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", self._command, str(self._theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[self._theirs.fileno()],
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # Ctrl-C is for the program, which then ends the server
            )
        with contextlib.suppress(OSError):  # if the server has ended already, the first call reports it
            self._connection.send(self._prepare)

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        """What a module's function returns in a fresh process. Raises CallFailed with the reason."""
        try:
            self.start()
            self._connection.send((limit_s, pickle.dumps((function, arguments))))
            if not self._connection.poll(START_S + limit_s):
                raise OSError("no answer")
            result, failure = self._connection.recv()
        except (OSError, EOFError) as error:
            self.close()  # the server is not restarted
            self._ended = self._ended or f"the process that measures memory ended: {error or type(error).__name__}"
            raise CallFailed(self._ended) from None
        if failure is not None:
            raise CallFailed(failure)
        return result

    def close(self) -> None:
        """End the server and its children."""
        self._connection.close()
        self._theirs.close()
        if self._server is not None and self._server.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._server.pid, signal.SIGKILL)  # it leads the process group of its children
            self._server.wait()


# --- in the server ------------------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Prepare, then answer calls until the program has ended. An answer is (result, None) or (None, failure)."""
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        connection.recv()()
        while True:
            connection.send(_in_a_child(*connection.recv()))


def _in_a_child(limit_s: float, call: bytes) -> tuple[Any, str | None]:
    """The answer of a child of this process, or how it ended."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(writer, call))
    child.start()
    writer.close()
    with reader, contextlib.suppress(EOFError, OSError):
        answer = reader.recv() if reader.poll(limit_s) else (None, f"it took longer than {limit_s:g} s")
        child.kill()
        child.join()
        return answer
    child.join()
    code = child.exitcode or 0
    return None, f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _answer(writer: Connection, call: bytes) -> None:
    result, failure = None, None
    try:
        function, arguments = pickle.loads(call)
        result = function(*arguments)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    writer.send((result, failure))
