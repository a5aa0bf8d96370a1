"""Handmade results of `bncli gradcheck`: one in which every case passes, one with failures."""

from __future__ import annotations

import math
from dataclasses import replace

from bncli.results.finding import Finding
from bncli.results.gradcheck import (
    BiasStep,
    BugMatch,
    CheckedCall,
    CheckFailure,
    CheckGroup,
    Diagnosis,
    Gradcheck,
    GradientPaths,
    NotChecked,
    ToleranceRule,
)
from tests.report.conftest import ENVIRONMENT

RULE: ToleranceRule = "kernel"
OTHER_RULE: ToleranceRule = "finite differences"
GROUPS = (
    CheckGroup("values", "forward, training", 96, 0, 0.3125, "train-float32-4x3x5x5-relu-y", RULE),
    CheckGroup("values", "forward, evaluation", 48, 0, 0.52, "eval-bfloat16-4x3x5x5-y", RULE),
    CheckGroup("derivatives", "double backward", 24, 0, 0.071, "train-float64-4x3-double", OTHER_RULE),
    CheckGroup(
        "derivatives",
        "channels_last_3d in half precision",
        0,
        0,
        None,
        None,
        RULE,
        NotChecked("no float64 on the device"),
    ),
    CheckGroup("hard inputs", "mean far from zero", 6, 0, 0.9, "mean-1e4-float32-dx", RULE),
)
PATHS = (
    GradientPaths(
        "images 4x4x4x4",
        35.2,
        6.4,
        6.84,
        33.98,
        3.0e-10,
        4.6e-9,
        0.2758,
        ((-1.2, 0.3, -0.1, 0.4), (0.1, -0.2, -0.1, 0.0), (1.1, 0.2, -0.1, -0.4)),
    ),
    GradientPaths("small batch 3x8", 16.9, 11.2, 11.3, 5.79, 9.1e-10, 2.4e-9, 2.748),
)
GOOD = Gradcheck(
    "native", "batch", "default", ENVIRONMENT, "torch's own operator", 21.34, GROUPS, PATHS, failures=(), diagnoses=()
)
CALL = CheckedCall("train", "float32", "contiguous", (4, 3, 5, 5), "relu", 1e-3)
OFF = Finding("off", "dx", 1.25e6, at=(0, 1, 2, 2), found=0.75, expected=0.25, relative=0.5)
NAN = Finding("nan_unexpected", "double backward in x", at=(1, 0), found=math.nan, expected=1.0)
MATCH = BugMatch("train-float32-4x3x5x5-relu", "dx", "the direct path alone", 1e-9, 0.27, 18, 20)
BAD = replace(
    GOOD,
    kernel="mine.kernels:batch_norm",
    groups=(
        GROUPS[0],
        replace(GROUPS[1], name="dx", failed=40, worst=1.25e6, worst_case="train-float32-4x3x5x5-relu-dx"),
        replace(GROUPS[2], failed=24, worst=math.inf),
    ),
    paths=(replace(PATHS[0], error=0.2758), PATHS[1]),
    failures=(
        CheckFailure("train-float32-4x3x5x5-relu-dx", "values", "", CALL, None, "dx", OFF),
        CheckFailure("train-float64-4x3-double", "values", "", CALL, None, "double backward", NAN),
    ),
    diagnoses=(Diagnosis("statistics treated as constants", MATCH),),
    allow_code=True,
)
FIRST = BAD.failures[0]
STEPS = (BiasStep(0, 0.0, 1.5562362, 0.0, 1.5562362), BiasStep(1000, 116.804236, 1.5562362, -4.8e-17, 1.5562362))
