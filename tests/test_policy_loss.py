"""The policy loss and its mismatch measures: against NumPy in float64, on packed rows, and on every mesh."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from etagent_jax.data.packing import Batch, TrainingSequence, pack
from etagent_jax.learner import losses, mismatch
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.scores import TokenScores
from etagent_jax.learner.step import Learner
from tests.learning import ADAMW, CONFIG, assert_same_bits, batch_of, leaves, subprocess_environment

MAX_SEQUENCE_WEIGHT = 1.5
REJECTING = PolicyLossConfig(temperature=0.7, max_sequence_weight=MAX_SEQUENCE_WEIGHT)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(CONFIG, ADAMW, policy=PolicyLossConfig(temperature=0.7))


@pytest.fixture(scope="module")
def rejecting() -> Learner:
    return Learner(CONFIG, ADAMW, policy=REJECTING)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(0)


# --- the formula ----------------------------------------------------------------------------------


def numpy_policy_loss(logprobs, entropy, old, sampler, reference, advantages, mask, c: PolicyLossConfig) -> dict:
    """The loss token by token, in float64."""
    total = dict.fromkeys(("loss", "policy_loss", "kl", "entropy", "ratio", "clip_fraction", "approximate_kl"), 0.0)
    for i in np.flatnonzero(mask):
        ratio = np.exp(logprobs[i] - old[i])
        advantage = advantages[i]
        objective = min(ratio * advantage, np.clip(ratio, 1 - c.clip_low, 1 + c.clip_high) * advantage)
        if advantage < 0:
            objective = max(objective, c.dual_clip * advantage)
        policy = -objective * min(np.exp(old[i] - sampler[i]), c.max_weight)
        kl = np.exp(reference[i] - logprobs[i]) - (reference[i] - logprobs[i]) - 1
        total["policy_loss"] += policy
        total["kl"] += kl
        total["entropy"] += entropy[i]
        total["ratio"] += ratio
        total["clip_fraction"] += not np.isclose(objective, ratio * advantage, rtol=1e-12)
        total["approximate_kl"] += ratio - 1 - np.log(ratio)
        total["loss"] += policy + c.kl_coefficient * kl - c.entropy_coefficient * entropy[i]
    return {name: value / mask.sum() for name, value in total.items()}


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_and_its_gradient_agree_with_numpy(seed):
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=1.5, max_weight=1.3, kl_coefficient=0.3,
                              entropy_coefficient=0.1)  # fmt: skip
    rng = np.random.default_rng(seed)
    old = -3 * rng.random(60)
    logprobs, sampler, reference = (old + 0.5 * rng.normal(size=60) for _ in range(3))
    entropy, advantages, mask = rng.random(60), rng.normal(size=60), rng.random(60) < 0.7
    # What stands where no loss falls must not matter, however wild.
    old[~mask], sampler[~mask] = 1e4, -1e4

    as_row = lambda x: jnp.asarray(x, jnp.float32)[None]
    ints = jnp.zeros((1, 60), jnp.int32)
    batch = Batch(ints, ints, ints, jnp.asarray(mask)[None], as_row(advantages), as_row(sampler))

    def loss(logprobs: jax.Array, entropy: jax.Array) -> tuple:
        scores = TokenScores(logprobs, entropy, jnp.zeros((1, 60), bool))
        tokens = jnp.float32(mask.sum())
        return losses.policy_loss(scores, batch, as_row(old), as_row(reference), tokens, config)

    gradients, metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(as_row(logprobs), as_row(entropy))
    arguments = (entropy, old, sampler, reference, advantages, mask, config)
    expected = numpy_policy_loss(logprobs, *arguments)
    assert 0.2 < expected["clip_fraction"] < 0.8
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(float(metrics[name]) - value) < 1e-5, name

    step = 1e-6
    for i in range(60):
        moved = np.zeros(60)
        moved[i] = step
        up, down = (numpy_policy_loss(logprobs + d, *arguments)["loss"] for d in (moved, -moved))
        assert abs(gradients[0][0, i] - (up - down) / (2 * step)) < 1e-5
    np.testing.assert_allclose(gradients[1][0], np.where(mask, -0.1 / mask.sum(), 0), atol=1e-7)


def test_on_policy_the_ratio_is_one_and_the_sampler_agrees(learner, batch):
    state = learner.init_state(0)
    old, _ = learner.score(state.params, batch)
    batch = dataclasses.replace(batch, sampler_logprobs=old)
    state, metrics = learner.policy_step(state, batch, old, old)
    assert abs(metrics["ratio"] - 1) < 1e-6
    assert abs(metrics["approximate_kl"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    for name in ("sampler_gap_mean", "sampler_gap_max", "sampler_k3", "sampler_gap_after_tool", "sequences_rejected"):
        assert metrics[name] == 0, name
    new, _ = learner.score(state.params, batch)
    gain = np.where(batch.loss_mask, (new - old) * batch.advantages, 0).sum()
    assert gain > 0


def test_without_a_reference_there_is_no_kl(learner, batch):
    _, metrics = learner.policy_step(learner.init_state(0), batch, batch.sampler_logprobs, None)
    assert "kl" not in metrics
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("clip_low", 1.0), ("dual_clip", 1.2), ("max_weight", 0.5), ("max_sequence_weight", 1.0)],
)
def test_a_policy_loss_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyLossConfig(**{field: value})


# --- the mismatch between sampler and learner -----------------------------------------------------


def rollouts(count: int, seed: int) -> tuple[list[TrainingSequence], list[np.ndarray]]:
    """Sequences of several turns, each of one token id of its own, and the learner's log-probabilities of each.

    Where a token bears no loss, these are wild: they must not matter.
    """
    rng = np.random.default_rng(seed)
    made, old = [], []
    for i in range(count):
        stretches = [(False, rng.integers(1, 4))]
        for _ in range(rng.integers(0, 4)):
            stretches += [(True, rng.integers(1, 14)), (False, rng.integers(1, 3))]
        mask = np.concatenate([np.full(n, learned) for learned, n in stretches])
        logprobs = np.where(mask, -3 * rng.random(mask.size), -50).astype(np.float32)
        gap = rng.normal() * 0.5 + rng.normal(size=mask.size)
        made.append(TrainingSequence(f"s{i}", np.full(mask.size, i, np.int32), mask, logprobs))
        old.append(np.where(mask, logprobs + gap, 1e4).astype(np.float32))
    return made, old


def packed(made: list[TrainingSequence], old: list[np.ndarray], length: int = 128) -> tuple[Batch, np.ndarray]:
    batch = pack(made, length, multiple=8)
    placed = np.full(batch.tokens.shape, -1e4, np.float32)
    for i, values in enumerate(old):
        placed[(batch.segment_ids > 0) & (batch.tokens == i)] = values
    return batch, placed


def numpy_gaps(made: list[TrainingSequence], old: list[np.ndarray]) -> list[np.ndarray]:
    """The gaps of the tokens that bear loss, sequence by sequence, in float64."""
    return [
        o[s.loss_mask].astype(np.float64) - s.logprobs[s.loss_mask].astype(np.float64)
        for s, o in zip(made, old, strict=True)
    ]


def numpy_after_tool(made: list[TrainingSequence], old: list[np.ndarray], first: int) -> list[float]:
    """|gap| of the first tokens of every turn but a sequence's first, token by token."""
    found = []
    for s, o in zip(made, old, strict=True):
        turn, place = 0, 0
        for t in range(1, len(s)):
            if s.loss_mask[t]:
                turn, place = (turn, place + 1) if s.loss_mask[t - 1] else (turn + 1, 0)
                if turn > 1 and place < first:
                    found.append(abs(float(o[t]) - float(s.logprobs[t])))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_gap_between_sampler_and_learner_is_measured(seed):
    made, old = rollouts(40, seed)
    batch, placed = packed(made, old)
    gaps, after_tool = np.concatenate(numpy_gaps(made, old)), numpy_after_tool(made, old, mismatch.AFTER_TOOL)
    metrics = jax.jit(mismatch.sampler_gap)(batch, placed, jnp.float32(gaps.size))
    expected = {
        "sampler_gap_mean": np.abs(gaps).mean(),
        "sampler_gap_max": np.abs(gaps).max(),
        "sampler_k3": (np.exp(gaps) - gaps - 1).mean(),
        "sampler_gap_after_tool": np.mean(after_tool),
    }
    assert 0 < len(after_tool) < gaps.size / 2
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_without_a_second_turn_the_gap_after_a_tool_is_zero():
    mask = np.array([False, True, True, False])
    one = TrainingSequence("s", np.zeros(4, np.int32), mask, np.zeros(4, np.float32))
    batch = pack([one, one], 8)
    metrics = mismatch.sampler_gap(batch, np.ones((1, 8), np.float32), jnp.float32(4))
    assert metrics["sampler_gap_mean"] == 1
    assert metrics["sampler_gap_after_tool"] == 0


def row_of(old: np.ndarray, sampler: np.ndarray) -> tuple[Batch, np.ndarray]:
    """One sequence in a row of its own, all of whose tokens but the first bear loss."""
    n = len(old) + 1
    sampler = np.concatenate([[0], sampler]).astype(np.float32)
    sequence = TrainingSequence("s", np.zeros(n, np.int32), np.arange(n) > 0, sampler)
    return pack([sequence], n), np.concatenate([[0], old]).astype(np.float32)[None]


def test_k3_is_the_kl_divergence_of_the_learner_from_the_sampler():
    sampler, learner = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    drawn = np.array([0, 0, 1, 2])  # each as often as the sampler draws it
    batch, old = row_of(np.log(learner[drawn]), np.log(sampler[drawn]))
    k3 = mismatch.sampler_gap(batch, old, jnp.float32(4))["sampler_k3"]
    np.testing.assert_allclose(k3, (sampler * np.log(sampler / learner)).sum(), rtol=1e-5)


def test_k3_is_exact_for_gaps_of_rounding_and_finite_for_wild_ones():
    gap = np.array([1e-4, -2e-4, 3e-4], np.float32)
    k3 = lambda gap: float(mismatch.sampler_gap(*row_of(gap, np.zeros(len(gap))), jnp.float32(len(gap)))["sampler_k3"])
    exact = gap.astype(np.float64)
    np.testing.assert_allclose(k3(gap), (np.exp(exact) - exact - 1).mean(), rtol=1e-3)
    assert np.isfinite(k3(np.array([500.0, -500.0])))


# --- sequences beyond the bound -------------------------------------------------------------------


def numpy_agrees(made: list[TrainingSequence], old: list[np.ndarray], bound: float) -> list[bool]:
    weights = [np.prod(np.exp(gaps)) ** (1 / gaps.size) if gaps.size else 1.0 for gaps in numpy_gaps(made, old)]
    return [bool(1 / bound <= weight <= bound) for weight in weights]


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_is_rejected_by_the_geometric_mean_of_its_weights(seed):
    made, old = rollouts(40, seed)
    batch, placed = packed(made, old)
    expected = numpy_agrees(made, old, MAX_SEQUENCE_WEIGHT)
    assert 5 < sum(expected) < 35
    found = np.asarray(jax.jit(mismatch.agrees, static_argnums=2)(batch, placed, MAX_SEQUENCE_WEIGHT))
    for i, agrees in enumerate(expected):
        assert (found[(batch.segment_ids > 0) & (batch.tokens == i)] == agrees).all(), i
    assert found[batch.segment_ids == 0].all()


def test_the_sum_over_a_sequence_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    values, segments = rng.normal(size=(1, 64)).astype(np.float32), np.repeat([[1, 2, 3, 0]], 16, axis=1)
    wild = np.where(segments == 2, values, 1e30 * values).astype(np.float32)
    one, other = (np.asarray(mismatch.sequence_sums(v, segments))[segments == 2] for v in (values, wild))
    np.testing.assert_allclose(one, values[segments == 2].astype(np.float64).sum(), rtol=1e-6)
    assert one.tobytes() == other.tobytes()


def off_policy(learner: Learner, batch: Batch) -> tuple[np.ndarray, Batch]:
    """The learner's log-probabilities, and the batch as of a sampler that is right in every third row alone."""
    old = np.asarray(learner.score(learner.init_state(0).params, batch)[0])
    shift = np.arange(len(old))[:, None] % 3 - 1
    return old, dataclasses.replace(batch, sampler_logprobs=(old + shift * batch.loss_mask).astype(np.float32))


def test_an_update_without_the_rejected_sequences_is_the_same(learner, rejecting, batch):
    old, batch = off_policy(learner, batch)
    kept = np.abs((old - batch.sampler_logprobs) * batch.loss_mask).max(axis=1) <= np.log(MAX_SEQUENCE_WEIGHT)
    assert 0 < kept.sum() < len(kept)
    state, metrics = rejecting.policy_step(rejecting.init_state(0), batch, old, None)
    without = dataclasses.replace(batch, loss_mask=batch.loss_mask & kept[:, None])
    expected_state, expected = learner.policy_step(learner.init_state(0), without, old, None)
    assert metrics["sequences_rejected"] == batch.segment_ids[~kept].max(axis=1).sum()
    assert metrics["tokens"] == batch.loss_mask[kept].sum()
    for name in ("loss", "grad_norm", "entropy", "ratio", "tokens"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6, err_msg=name)
    gap = np.abs((old - batch.sampler_logprobs)[batch.loss_mask])
    np.testing.assert_allclose(metrics["sampler_gap_mean"], gap.mean(), rtol=1e-5)  # of all, the rejected included
    for a, b in zip(leaves(state.params), leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_where_every_sequence_is_rejected_nothing_is_applied(rejecting, batch):
    state = rejecting.init_state(0)
    before = jax.tree.map(np.array, state)
    old = batch.sampler_logprobs + 1
    state, metrics = rejecting.policy_step(state, batch, old, None)
    assert metrics["sequences_rejected"] == 14
    assert metrics["skipped"] == 1
    assert_same_bits((state.params, state.opt_state, state.gradient_norm),
                     (before.params, before.opt_state, before.gradient_norm))  # fmt: skip


def test_micro_batches_reject_the_same_sequences(learner, rejecting, batch):
    old, batch = off_policy(learner, batch)
    four = Learner(CONFIG, ADAMW, policy=REJECTING, micro_batches=4)
    one, split = (made.policy_step(made.init_state(0), batch, old, None)[1] for made in (rejecting, four))
    assert one["sequences_rejected"] == split["sequences_rejected"] > 0
    for name, value in one.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


PROGRAM = """
import json
from etagent_jax.learner import mesh
from tests.learning import *
from tests.test_policy_loss import REJECTING, off_policy

one = Learner(CONFIG, ADAMW, policy=REJECTING, mesh=mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
old, batch = off_policy(one, pack(sequences(28), LENGTH, rows=16))
out = {}
for axes in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 4, 1)):
    there = mesh.make_mesh(*axes, devices=jax.devices()[:int(np.prod(axes))])
    learner = Learner(CONFIG, ADAMW, policy=REJECTING, mesh=there, micro_batches=2)
    state = learner.init_state(0)
    for _ in range(2):
        state, metrics = learner.policy_step(state, batch, old, None)
    out[str(axes)] = {name: float(value) for name, value in metrics.items()} | {"mean": float(state.gradient_norm)}
print(json.dumps(out))
"""


@pytest.mark.slow
def test_every_mesh_rejects_the_same_sequences_and_measures_the_same_mismatch():
    environment = subprocess_environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, *others = json.loads(done.stdout.splitlines()[-1]).values()
    assert 0 < one["sequences_rejected"] < 28
    for other in others:
        assert [other[name] for name in ("sequences_rejected", "tokens", "skipped")] == [
            one[name] for name in ("sequences_rejected", "tokens", "skipped")
        ]
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
