"""The loop of supervised training, for `base` and `sft`: rows in, a finished model folder out."""

import asyncio
import time
from collections.abc import Callable

import numpy as np

from etagent_jax import distributed
from etagent_jax.data.packing import Batch
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.step import Learner, TrainState, check_finite
from etagent_jax.learner.throughput import throughput
from etagent_jax.stages import setup
from etagent_jax.stages.directory import StageDirectory
from etagent_jax.stages.metrics import MetricsLog, speed
from etagent_jax.tokenizer import Tokenizer


async def train(
    directory: StageDirectory,
    learner: Learner,
    initial: Callable[[], TrainState],
    batch_of_step: Callable[[int], Batch],
    steps: int,
    tokenizer: Tokenizer,
    checkpoint_every: int,
    description: str,
) -> dict[str, float]:
    """Train for `steps` steps and write the model folder; returns the last step's metrics.

    batch_of_step depends on the step alone, so a resumed run sees what an uninterrupted one would.
    Cancelling saves a checkpoint first.
    """
    distributed.say(f"{description}: {learner.summary}")
    checkpoints = Checkpoints(directory.checkpoints)
    start, state, metrics = setup.resume(checkpoints, learner, initial)
    with MetricsLog(directory.path, total_steps=steps, start_step=start, description=description) as log:
        for step in range(start, steps):
            began = time.perf_counter()
            batch = batch_of_step(step)
            state, device_metrics = learner.sft_step(state, batch)
            metrics = {name: float(value) for name, value in device_metrics.items()}
            check_finite(metrics, step)
            metrics |= throughput(learner, batch, time.perf_counter() - began)
            log.log(step, metrics, line(metrics) if step % 50 == 0 or step + 1 == steps else None)
            due = (step + 1) % checkpoint_every == 0 or step + 1 == steps
            if due:
                checkpoints.save(step + 1, learner.changing(state), metrics)
            try:
                await distributed.together(asyncio.sleep(0))
            except asyncio.CancelledError:
                if not due:
                    checkpoints.save(step + 1, learner.changing(state), metrics)
                raise
    setup.save_model(learner, state.params, tokenizer, directory.model)
    checkpoints.close()
    return metrics


def line(metrics: dict[str, float]) -> str:
    return (
        f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.3f}  "
        f"gradient norm {metrics['grad_norm']:.2f}  {speed(metrics)}"
    )


def epochs_of_rows(batch: Batch, rows: int, seed: int) -> Callable[[int], Batch]:
    """Step → `rows` rows of `batch`, every row once an epoch, in an order of the epoch's own."""
    per_epoch = len(batch.tokens) // rows

    def of_step(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(batch.tokens))
        return batch.take(order[place * rows : (place + 1) * rows])

    return of_step
