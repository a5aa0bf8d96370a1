"""Function calls in fresh processes: a server that has loaded torch forks a child for each call.

A call starts from the memory of a process that has loaded a module and done next to nothing else, and one that crashes
or hangs costs its own result alone. multiprocessing's own fork server would not do: it is one for the whole program,
lives as long as that, takes the program's environment, and until Python 3.11 cannot leave the current folder, in which
a torch.py may stand, out of the path. No torch here: the server may load it while the program does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

START_S = 60.0  # to load torch in the server, on a busy machine
ANSWER_S = 10.0  # for the server to report a child that has ended
# Without the current folder on the path, which -c puts there: a torch.py in it must not be run.
SERVER = (
    "import sys; sys.path.remove(''); from bncli.measure.timing.fresh_process import serve; serve(int(sys.argv[1]))"
)


class CallFailed(RuntimeError):
    """A call that did not come through: what it raised, how its process ended, or that it took too long."""


class ServerGone(CallFailed):
    """The server could not be started or has ended; no further call can be made."""


class FreshProcesses:
    """A server for calls in fresh processes. Use it as a context, which ends the server and its children.

    prepare: a module's function without arguments, which the server runs first. What it imports, and the module it is
    in, is there in every child. The server has one thread and no GPU, since neither lives on in a fork.
    """

    def __init__(self, prepare: Callable[[], object]) -> None:
        self._prepare = prepare
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = self._gone = False

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def server_pid(self) -> int | None:
        """The server's process, which leads the process group of its children; None where there is none."""
        return None if self._server is None else self._server.pid

    def start(self) -> None:
        """Let the server load and prepare, and go on. Without it, the first call is waited for longer."""
        if self._server is not None or self._gone:
            return
        if not hasattr(os, "fork"):
            raise ServerGone("processes cannot be forked on this system")
        self._connection, theirs = Pipe()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
                start_new_session=True,  # Ctrl-C is for the program, which then ends the server
            )
        with contextlib.suppress(OSError):  # of a server that has ended at once, which the first call finds out
            self._connection.send(self._prepare)

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        """What a module's function returns in a fresh process. Raises CallFailed with the reason."""
        if self._gone:
            raise ServerGone("the process that measures memory ended")
        self.start()
        assert self._connection is not None
        try:
            if not self._ready:
                self._answer(START_S)
                self._ready = True
            self._connection.send((limit_s, pickle.dumps((function, arguments))))
            result, failure = self._answer(limit_s + ANSWER_S)
        except (OSError, EOFError) as error:
            self.close()
            self._gone = True
            raise ServerGone(f"the process that measures memory ended: {error or type(error).__name__}") from None
        if failure is not None:
            raise CallFailed(failure)
        return result

    def _answer(self, limit_s: float) -> Any:
        assert self._connection is not None
        if not self._connection.poll(limit_s):
            raise OSError("no answer")
        return self._connection.recv()

    def close(self) -> None:
        """End the server and what it has forked."""
        server, self._server, self._ready = self._server, None, False
        if server is not None and self._connection is not None:
            with contextlib.suppress(OSError):
                os.killpg(server.pid, signal.SIGKILL)  # its session is its own
            self._connection.close()
            server.wait()


def _path() -> str:
    return os.pathsep.join(entry for entry in sys.path if entry)


# --- in the server ------------------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Prepare, then answer calls until the program has ended. An answer is (result, None) or (None, failure)."""
    with contextlib.suppress(EOFError, OSError), Connection(handle) as connection:
        connection.recv()()
        connection.send("ready")
        while True:
            connection.send(_in_a_child(*connection.recv()))


def _in_a_child(limit_s: float, call: bytes) -> tuple[Any, str | None]:
    """The answer of a child of this process, or how it ended. It ends itself when it takes too long."""
    reader, writer = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reader.close()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            writer.send(_outcome(call))
            code = 0
        finally:
            os._exit(code)
    writer.close()
    answer = None
    with reader, contextlib.suppress(EOFError, OSError):
        answer = reader.recv()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and answer is not None:
        return answer
    if code == -signal.SIGALRM:
        return None, f"it took longer than {limit_s:g} s"
    return None, f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _outcome(call: bytes) -> tuple[Any, str | None]:
    try:
        function, arguments = pickle.loads(call)
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
