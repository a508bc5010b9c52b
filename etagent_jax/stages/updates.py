"""The updates of a calibration step: from scored groups to packed batches and new parameters."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from etagent_jax import distributed
from etagent_jax.data.packing import Batch, pack, sequence_from_trajectory
from etagent_jax.learner.step import Learner, Params, TrainState
from etagent_jax.learner.throughput import throughput
from etagent_jax.scoring.rewards import ScoredGroup
from etagent_jax.stages import setup

MOST_SKIPPED = 32
"""Updates in a row that may be skipped before the run ends."""


@dataclass
class Updates:
    """The policy-gradient updates of one calibration stage.

    reference: parameters of the KL term, if the loss has one.  skipped: folder where the batch of an update that was
    not applied is kept, as NumPy arrays by the names of `Batch`.
    """

    learner: Learner
    reference: Params | None
    section: ConfigDict
    skipped: Path
    skipped_in_a_row: int = 0

    def __call__(
        self, state: TrainState, scored: Sequence[ScoredGroup], order: np.random.Generator, step: int
    ) -> tuple[TrainState, dict[str, float]]:
        """The updates of one step: `epochs` passes over the groups with spread, in `minibatches` parts.

        FloatingPointError once MOST_SKIPPED updates in a row were not applied.
        """
        c, learner = self.section, self.learner
        kept = [group for group in scored if group.has_spread]
        metrics: dict[str, float] = {"groups_without_spread": len(scored) - len(kept)}
        rows = learner.whole_rows(setup.step_rows(c))
        parts = np.array_split(order.permutation(len(kept)), c.minibatches)
        packed = [pack_groups([kept[i] for i in part], c.length, rows, c.drop_void) for part in parts]
        batches = [batch for batch in packed if batch is not None]
        if not batches:
            return state, metrics
        old = [learner.score(state.params, batch)[0] for batch in batches]
        reference = self.reference
        ref = [learner.score(reference, batch)[0] if reference is not None else None for batch in batches]
        jax.block_until_ready((old, ref))
        history: list[dict[str, jax.Array]] = []
        began = time.perf_counter()
        for _ in range(c.epochs):
            for batch, old_logprobs, ref_logprobs in zip(batches, old, ref, strict=True):
                state, device_metrics = learner.policy_step(state, batch, old_logprobs, ref_logprobs)
                history.append(device_metrics)
        updates = [{name: float(value) for name, value in update.items()} for update in jax.device_get(history)]
        seconds = time.perf_counter() - began
        for number, update in enumerate(updates):
            if update["skipped"]:
                self._keep(batches[number % len(batches)], update, step, number)
            else:
                self.skipped_in_a_row = 0
        applied = [update for update in updates if not update["skipped"]]
        for name in [name for name in updates[0] if name != "skipped"]:
            counted = updates if name.startswith("sampler_") else applied
            if counted:
                metrics[name] = sum(update[name] for update in counted) / len(counted)
        metrics["sampler_gap_max"] = max(update["sampler_gap_max"] for update in updates)
        metrics["sequences_rejected"] = sum(update["sequences_rejected"] for update in updates)
        metrics["updates_skipped"] = len(updates) - len(applied)
        if applied:
            metrics["entropy"] = applied[0]["entropy"]
        return state, {**metrics, **throughput_of_all(learner, batches, c.epochs, seconds)}

    def _keep(self, batch: Batch, update: dict[str, float], step: int, number: int) -> None:
        """Put aside the batch of an update that was not applied, and say so."""
        self.skipped_in_a_row += 1
        file = self.skipped / f"step-{step:05d}-update-{number}.npz"
        if distributed.is_first():
            self.skipped.mkdir(exist_ok=True)
            np.savez_compressed(file, **vars(batch))
        told = (f"loss {update['loss']:.3g}, gradient norm {update['grad_norm']:.3g}, "
                f"{update['sequences_rejected']:.0f} sequences rejected")  # fmt: skip
        distributed.say(f"step {step}: update {number} was not applied ({told}); its batch is in {file}")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"step {step}: {self.skipped_in_a_row} updates in a row were not applied, the last with {told}. "
                "Lower the learning rate, raise skip_factor or max_sequence_weight, or look for bad values in the "
                f"batches in {self.skipped}"
            )


def pack_groups(groups: Sequence[ScoredGroup], length: int, rows: int, drop_void: bool = False) -> Batch | None:
    """The trajectories of these groups with their advantages, loss on what the model sampled; None if there are none.

    drop_void: leave out trajectories with a void turn.  Always `rows` rows, so that the step is compiled once; the
    learner skips the empty ones.
    """
    sequences = [
        sequence_from_trajectory(trajectory, sources=("model",), advantage=float(advantage))
        for group in groups
        for trajectory, advantage in zip(group.group.trajectories, group.advantages, strict=True)
        if not (drop_void and trajectory.has_void_turn)
    ]
    return pack(sequences, length, rows=rows) if sequences else None


def throughput_of_all(learner: Learner, batches: Sequence[Batch], epochs: int, seconds: float) -> dict[str, float]:
    """As `throughput`, of updates on all `batches`, each `epochs` times, in `seconds` together."""
    each = [throughput(learner, batch, seconds) for batch in batches]
    rates = {name: epochs * sum(one[name] for one in each) for name in each[0] if name != "memory_gib"}
    return {**rates, "memory_gib": max(one["memory_gib"] for one in each)}
