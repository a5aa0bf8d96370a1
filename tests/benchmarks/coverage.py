"""How many real batch norm calls the fused kernel reads once: python -m tests.benchmarks.coverage --shapes FILE.csv

The file has a line a shape with the columns n, c, spatial (14x14, 32x32x8) and calls. No GPU is needed: which plan a
shape takes is arithmetic (bncli/kernels/fused/tiling.py).

2026-12-01, the 5,173 training calls in 693 shapes of about 70 networks that meta-pytorch/tritonbench records
(tritonbench/data/input_configs, fp16), planned for 132 multiprocessors:

    contiguous     forward   read once 99.8 % of calls, 97.9 % of bytes
    contiguous     backward  read once 98.9 % of calls, 95.8 % of bytes
    channels last  forward   read once 87.3 % of calls, 56.2 % of bytes
    channels last  backward  read once 75.7 % of calls, 41.1 % of bytes
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bncli.kernels.fused.tiling import Plan, Processors, plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors of the GPU (an H200's)")
    parser.add_argument("--itemsize", type=int, default=2, choices=(2, 4), help="bytes of an element")
    options = parser.parse_args(arguments)
    with options.shapes.open() as file:
        lines = list(csv.DictReader(file))
    gpu = Processors(options.processors, cooperative=True)
    for contiguous, backward in itertools.product((True, False), (False, True)):
        calls: Counter[str] = Counter()
        bytes_: Counter[bool] = Counter()
        for line in lines:
            shape = (int(line["n"]), int(line["c"]), math.prod(int(side) for side in line["spatial"].split("x")))
            found = plan(shape, contiguous=contiguous, itemsize=options.itemsize, backward=backward, processors=gpu)
            calls[way(found)] += int(line["calls"])
            bytes_[found.single_read] += int(line["calls"]) * math.prod(shape) * options.itemsize
        once = calls["alone"] + calls["team"]
        print(
            f"{'contiguous' if contiguous else 'channels last':14} {'backward' if backward else 'forward':9} "
            f"read once {once / calls.total():.1%} of calls, {bytes_[True] / bytes_.total():.1%} of bytes   "
            + ", ".join(f"{name} {count:,}" for name, count in calls.most_common())
        )


def way(found: Plan) -> str:
    if found.barrier == "launch":
        return "two launches"
    return ("alone" if found.barrier == "none" else "team") + (", in part" if found.overflow else "")


if __name__ == "__main__":
    main()
