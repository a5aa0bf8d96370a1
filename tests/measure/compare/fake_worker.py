"""A worker that speaks the protocol without torch; what a run does is written in its recipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    device = sys.argv[sys.argv.index("--device") + 1]
    if device == "absent":
        say(refused=["is not here"], field="device", value="absent", exit_code=3)
        return
    if device == "broken":
        print("ImportError: no such library", file=sys.stderr)
        sys.exit(1)
    say(hello=device, gpus=2 if device == "cuda" else 0)
    for line in sys.stdin:
        order = json.loads(line)
        if "give up" in order:
            continue
        (job,) = order["runs"]
        key, act = job["key"], job["recipe"]["act"]
        say(key=key, step=1, value=0.5)
        if act == "die":
            print("I die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "end Dask":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)  # until the end of standard input
        if act == "exit":
            os._exit(7)
        if act == "fail":
            print("ValueError: no", file=sys.stderr, flush=True)
            say(key=key, failure="ValueError: no")
            continue
        if act == "sleep":
            time.sleep(3600)  # until the worker is killed
        if act == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if act == "save":
            assert "stop" in json.loads(sys.stdin.readline())
            Path(job["checkpoint"]).write_text(key)
            say(key=key, stopped=1)
            continue
        if act == "wait":
            assert "give up" in json.loads(sys.stdin.readline())
        if act == "save slowly":  # and is done before it has seen that it is to stop
            assert "stop" in json.loads(sys.stdin.readline())
        for step in range({"go on": 60, "go on a while": 10}.get(act, 0)):  # 3 s, 0.5 s
            time.sleep(0.05)
            say(key=key, step=step, value=0.5)
        if act == "refuse":
            say(refused=["data.path: there is no file"], exit_code=2)
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        say(key=key, result={"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "visible": visible})


if __name__ == "__main__":
    main()
