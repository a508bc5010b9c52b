"""What the tests of the learner share: a tiny model, optimizers, sequences, and comparison to the bit."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from etagent_jax.data.packing import Batch, TrainingSequence, pack
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner, TrainState
from etagent_jax.model.transformer import ModelConfig

VOCABULARY, LENGTH = 48, 32
CONFIG = ModelConfig(VOCABULARY, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8)  # fmt: skip
ADAMW = OptimizerConfig(3e-3, total_steps=60, warmup_steps=2, schedule="cosine", weight_decay=0.1)
MUON = dataclasses.replace(ADAMW, name="muon")
POLICY = PolicyLossConfig(temperature=0.7, kl_coefficient=0.1, entropy_coefficient=0.01)


def sequences(count: int, seed: int = 0) -> list[TrainingSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(5, 20))
        mask = rng.random(n) < 0.6
        mask[0], mask[-1] = False, True
        logprobs = np.where(mask, -3 * rng.random(n), 0).astype(np.float32)
        made.append(TrainingSequence(f"s{i}", rng.integers(0, VOCABULARY, n, np.int32), mask, logprobs, rng.normal()))
    return made


def batch_of(step: int, rows: int = 8) -> Batch:
    """The batch follows from the step alone, so a resumed run sees what an uninterrupted one saw."""
    return pack(sequences(14, seed=step), LENGTH, rows=rows)


def fine_tune(learner: Learner, steps: int, state: TrainState | None = None) -> tuple[TrainState, list[float]]:
    """`steps` updates and their losses."""
    state = learner.init_state(0) if state is None else state
    losses = []
    for _ in range(steps):
        state, metrics = learner.sft_step(state, batch_of(int(state.step)))
        losses.append(float(metrics["loss"]))
    return state, losses


def calibrate(learner: Learner, steps: int, state: TrainState | None = None) -> tuple[TrainState, list[float]]:
    """`steps` policy updates, off-policy by one, against the initial parameters as reference; and their losses."""
    state = learner.init_state(0) if state is None else state
    reference, losses = learner.init_state(0).params, []
    for _ in range(steps):
        batch = batch_of(int(state.step))
        old, ref = (learner.score(params, batch)[0] for params in (state.params, reference))
        for _ in range(2):
            state, metrics = learner.policy_step(state, batch, old, ref)
            losses.append(float(metrics["loss"]))
    return state, losses


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(one, other) -> None:
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def subprocess_environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}
