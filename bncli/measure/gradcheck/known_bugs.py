"""The bugs that are looked for by what they would give."""

from __future__ import annotations

import torch

from bncli.kernels.definition import Twist
from bncli.measure.gradcheck.hypotheses import (
    Hypothesis,
    all_misread,
    by_a_tenth,
    by_itself,
    by_the_deviation,
    channels_last,
    detached,
    divided_by,
    evaluation,
    g_misread,
    gradients_alone,
    half,
    in_dtype_of,
    moving,
    positions,
    read_back,
    swapped,
    training,
    twice,
    without_running,
)

HYPOTHESES = (
    Hypothesis(
        "statistics treated as constants",
        "the direct part alone",
        lambda case: Twist(mean=detached, var=detached),
        applies=training,
    ),
    Hypothesis(
        "the mean's path is missing",
        "the gradient without its path through the mean",
        lambda case: Twist(mean=detached),
        applies=training,
    ),
    Hypothesis(
        "the variance's path is missing",
        "the gradient without its path through the variance",
        lambda case: Twist(var=detached),
        applies=training,
    ),
    Hypothesis(
        "biased running variance",
        "the moving average of the variance over m, not m - 1,",
        lambda case: Twist(move_var=lambda running, var, momentum, m: running.lerp(var, momentum)),
        applies=training,
    ),
    Hypothesis(
        "unbiased normalization",
        "what the variance over m - 1 gives",
        lambda case: Twist(bessel=True),
        applies=training,
    ),
    Hypothesis(
        "momentum swapped",
        "momentum old + (1 - momentum) new",
        lambda case: Twist(
            move_mean=lambda running, mean, momentum: running.lerp(mean, 1 - momentum),
            move_var=lambda running, var, momentum, m: running.lerp(var * (m / (m - 1)), 1 - momentum),
        ),
        applies=training,
    ),
    Hypothesis(
        "no running update",
        "its value before the call",
        lambda case: Twist(
            move_mean=lambda running, mean, momentum: running, move_var=lambda running, var, momentum, m: running
        ),
        applies=training,
    ),
    Hypothesis("the running statistics move twice", "what two moves give", moving(True, True, twice), applies=training),
    Hypothesis("momentum ignored", "what a momentum of 0.1 gives", moving(True, True, by_a_tenth), applies=training),
    Hypothesis(
        "momentum ignored for the running mean",
        "what a momentum of 0.1 gives",
        moving(True, False, by_a_tenth),
        applies=training,
    ),
    Hypothesis(
        "momentum ignored for the running variance",
        "what a momentum of 0.1 gives",
        moving(False, True, by_a_tenth),
        applies=training,
    ),
    Hypothesis(
        "the deviation stored as the running variance",
        "the moving average of the deviation",
        moving(False, True, by_the_deviation),
        applies=training,
    ),
    Hypothesis(
        "eps outside the root",
        "what 1/(sqrt(var) + eps) gives",
        lambda case: Twist(inverse_deviation=lambda var, eps: 1 / (torch.where(var > 0, var, 1e-60).sqrt() + eps)),
    ),
    Hypothesis(
        "eps ignored",
        "what 1/sqrt(var) gives",
        lambda case: Twist(inverse_deviation=lambda var, eps: var.rsqrt()),
    ),
    Hypothesis(
        "eps ignored in the gradient",
        "what 1/sqrt(var) gives",
        lambda case: Twist(inverse_deviation=lambda var, eps: var.rsqrt()),
        results=gradients_alone,
    ),
    Hypothesis(
        "half-precision statistics", "what statistics rounded to half precision give", in_dtype_of, applies=half
    ),
    Hypothesis(
        "evaluation uses the batch's statistics",
        "what the batch's own statistics give",
        lambda case: Twist(batch_in_evaluation=True),
        applies=evaluation,
    ),
    Hypothesis(
        "evaluation differentiates through the batch's mean",
        "the gradient with its path through the mean, which evaluation has not,",
        lambda case: Twist(mean_path_in_evaluation=True),
        applies=evaluation,
    ),
    Hypothesis(
        "evaluation takes training's gradient",
        "the gradient with its paths through the mean and the variance, which evaluation has not,",
        lambda case: Twist(mean_path_in_evaluation=True, variance_path_in_evaluation=True),
        applies=evaluation,
    ),
    Hypothesis(
        "each example normalized by itself",
        "what instance norm gives",
        results=without_running,
        applies=lambda case: case.training and positions(case) > 1,
        another=by_itself,
    ),
    Hypothesis(
        "training uses the running statistics",
        "what the running statistics give",
        lambda case: Twist(running_in_training=True),
        applies=training,
    ),
    Hypothesis("dweight and dbias swapped", "the other of the two", results=swapped),
    Hypothesis(
        "a mean in place of a sum in dweight and dbias",
        "the true one divided by m",
        results=divided_by(lambda case: case.m, "dweight", "dbias"),
    ),
    Hypothesis(
        "a mean in place of a sum in dbias",
        "the true one divided by the number of positions",
        results=divided_by(positions, "dbias"),
        applies=lambda case: positions(case) > 1,
    ),
    Hypothesis(
        "a mean in place of a sum in dweight",
        "the true one divided by the number of positions",
        results=divided_by(positions, "dweight"),
        applies=lambda case: positions(case) > 1,
    ),
    Hypothesis(
        "the residual's gradient is missing",
        "zero",
        lambda case: Twist(residual=detached),
        applies=lambda case: case.adds,
    ),
    Hypothesis(
        "the activation's gradient is ignored",
        "what an activation's derivative of 1 gives",
        lambda case: Twist(linear_activation=True),
        applies=lambda case: case.activation is not None,
    ),
    Hypothesis(
        "the residual is added after the activation",
        "what the sum after the activation gives",
        lambda case: Twist(residual_last=True),
        applies=lambda case: case.adds and case.activation is not None,
    ),
    Hypothesis(
        "channels_last memory taken for contiguous",
        "what the memory gives when it is read in the order of a contiguous tensor",
        inputs=all_misread,
        results=read_back,
        applies=channels_last,
    ),
    Hypothesis(
        "the upstream gradient taken for contiguous",
        "what the upstream gradient's memory gives when it is read in the order of a contiguous tensor",
        inputs=g_misread,
        applies=channels_last,
    ),
)
