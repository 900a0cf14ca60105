"""Learning-rate finder (`--find_learning_rate`): trains over a ramp of rates and suggests one."""

import contextlib
import math

import numpy as np
import tensorflow as tf

from training import pictures, step_functions

LOWEST, HIGHEST, UPDATES = 1e-6, 10.0, 100
SMOOTHING = 0.9
FIRST = 10  # first updates, ignored because the moving average is still noisy


def find_learning_rate(run, training_batches, during=lambda phase: contextlib.nullcontext()):
    """Trains with exponentially growing learning rates until the loss diverges; suggests a rate.

    It suggests a tenth of the rate with the lowest smoothed loss, where the loss falls steeply, at
    a safe distance from divergence. The first `FIRST` updates are ignored, because their average is
    dominated by the noise of single batches.

    Args:
        run: A `training.loop.Run`, whose model must not be used afterwards.
        training_batches: Function from (epoch, first step) to a `tf.data.Dataset`.
        during: Function from a phase, "input" or "update", to a context that watches it. Defaults
            to none.

    Returns:
        A dict: `learning_rate`, `files`.

    Raises:
        ValueError: If the loss never decreased.
    """
    rates = np.geomspace(LOWEST, HIGHEST, UPDATES)
    losses, smooth, average = [], [], 0.0
    for step, batch in enumerate(batches(run, training_batches, during)):
        mixing = step_functions.draw_mixing(run.config, step, run.size, 0, run.groups)
        arguments = (float(step), rates[step].astype("float32"), 0.0, mixing)
        with during("update"):
            loss = float(run.train_step(batch, *(tf.constant(x) for x in arguments))[0])
        if not math.isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        losses.append(loss)
        smooth.append(average / (1 - SMOOTHING ** (step + 1)))
        if run.chief and (step == 0 or (step + 1) % 10 == 0):
            print(
                f"update {step + 1} of at most {UPDATES}, learning rate {rates[step]:.2g}, "
                f"loss {smooth[-1]:.4g}",
                flush=True,
            )
        if smooth[-1] > 2 * min(smooth) + 1:
            break
    best = FIRST + int(np.argmin(smooth[FIRST:])) if len(smooth) > FIRST else FIRST
    if best == FIRST:
        raise ValueError(
            f"the loss never fell between the learning rates {LOWEST:g} and {HIGHEST:g}: are the "
            "images and labels what they should be?"
        )
    chosen = float(rates[best] / 10)
    path = run.workdir / "learning_rate.png"
    if run.chief:
        pictures.learning_rates(rates[: len(losses)], losses, smooth, chosen, path)
    return {"learning_rate": chosen, "files": {path.name: str(path)}}


def batches(run, training_batches, during):
    """Yields `UPDATES` distributed batches, over as many epochs as needed."""
    taken = 0
    for epoch in range(UPDATES):
        with during("input"):
            dataset = run.strategy.distribute_datasets_from_function(
                lambda context, epoch=epoch: training_batches(epoch, 0)
            )
            iterator = iter(dataset)
        while True:
            with during("input"):
                batch = next(iterator, None)
            if batch is None:
                break
            yield batch
            taken += 1
            if taken == UPDATES:
                return
