"""The guard of updates: what it lets pass, how its mean moves, and what a skipped update leaves behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from etagent_jax.data.packing import Batch
from etagent_jax.learner import guard
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner, TrainState
from tests.learning import ADAMW, CONFIG, assert_same_bits, batch_of

FACTOR = 10.0


def guarded(norms: list[float], factor: float = FACTOR) -> tuple[list[bool], list[float]]:
    """Which updates with these gradient norms are applied, and the mean after each."""
    within, move = jax.jit(guard.within_bound, static_argnums=3), jax.jit(guard.running_mean)
    mean, applied = jnp.float32(0), jnp.int32(0)
    let_pass, means = [], []
    for norm in norms:
        passes = within(jnp.float32(norm), mean, applied, factor)
        mean, applied = move(jnp.float32(norm), mean, applied), applied + passes
        let_pass.append(bool(passes))
        means.append(float(mean))
    return let_pass, means


def test_the_mean_follows_its_definition():
    rng = np.random.default_rng(0)
    norms = [*np.exp(0.3 * rng.normal(size=30)), np.nan, 3.0, np.inf, 80.0, 1.0]
    mean, applied, expected = 0.0, 0, []
    for norm in norms:
        if np.isfinite(norm):
            counted = min(norm, 2 * mean) if mean else norm
            mean += max(1 / (applied + 1), 0.1) * (counted - mean)
            applied += norm <= 10 * mean
        expected.append(mean)
    np.testing.assert_allclose(guarded(norms)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(guarded(norms)[1][9], np.mean(norms[:10]), rtol=1e-5)


def test_a_spike_is_skipped_and_cannot_raise_its_own_bound():
    let_pass, means = guarded([1.0] * 20 + ([1e6] + [1.0] * 4) * 20)
    assert let_pass == [True] * 20 + ([False] + [True] * 4) * 20
    assert means[20] == pytest.approx(1.1)
    assert max(means) < 1.4


def test_a_norm_that_has_risen_for_good_passes_in_the_end():
    rise = 3 * FACTOR
    let_pass, _ = guarded([1.0] * 20 + [rise] * 30)
    skipped = int(np.ceil(np.log(rise / FACTOR) / np.log(1.1)))
    assert let_pass == [True] * 20 + [False] * skipped + [True] * (30 - skipped)


def test_the_first_updates_are_bounded_by_nothing_but_finiteness():
    assert guarded([1.0, 1e6, np.inf, 1.0, np.nan, 1e3, 1.0])[0] == [True, True, False, True, False, True, True]


def test_without_a_factor_only_what_is_not_finite_is_skipped():
    assert guarded([1.0] * 9 + [1e9, np.nan], factor=0)[0] == [True] * 10 + [False]


def test_gradients_of_zero_bound_nothing():
    assert all(guarded([0.0] * 8 + [1.0] * 3)[0])
    assert guarded([1.0] * 10 + [0.0] * 3)[1][-1] == pytest.approx(0.9**3, rel=1e-5)


def test_a_factor_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"skip_factor must be above 1, or 0 .* got 0\.5"):
        OptimizerConfig(1e-3, total_steps=1, skip_factor=0.5)


# --- in a step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(CONFIG, dataclasses.replace(ADAMW, skip_factor=FACTOR, schedule="constant", warmup_steps=20))


@pytest.fixture(scope="module")
def warm(learner) -> TrainState:
    """After as many updates as bound the norm; a copy, as steps donate their state."""
    state = learner.init_state(0)
    for step in range(guard.WARM_UP):
        state, metrics = update(learner, state, batch_of(step))
        assert metrics["skipped"] == 0
    return jax.device_get(state)


def update(learner: Learner, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
    state = jax.device_put(state, learner.shardings)
    state, metrics = learner.policy_step(state, batch, np.array(batch.sampler_logprobs), None)
    return state, jax.device_get(metrics)


def scaled(batch: Batch, factor: float) -> Batch:
    advantages = np.where(batch.loss_mask, batch.advantages, 1.0) * factor
    return dataclasses.replace(batch, advantages=advantages.astype(np.float32))


@pytest.mark.parametrize("factor", [1e4, np.inf])
def test_a_skipped_update_changes_only_the_counts_and_the_mean(learner, warm, factor):
    state, metrics = update(learner, warm, scaled(batch_of(7), factor))
    assert metrics["skipped"] == 1
    assert not metrics["grad_norm"] <= FACTOR * warm.gradient_norm
    assert_same_bits((state.params, state.opt_state), (warm.params, warm.opt_state))
    assert (state.step, state.skipped) == (guard.WARM_UP + 1, 1)
    rise = 1 + 1 / (guard.WARM_UP + 1) if np.isfinite(factor) else 1.0
    np.testing.assert_allclose(state.gradient_norm, rise * warm.gradient_norm, rtol=1e-5)


def test_after_a_skipped_update_training_goes_on_as_if_it_had_not_been(learner, warm):
    poisoned, _ = update(learner, warm, scaled(batch_of(7), np.nan))
    (one, after), (other, without) = (update(learner, state, batch_of(8)) for state in (poisoned, warm))
    assert after == without
    assert_same_bits(
        (one.params, one.opt_state, one.gradient_norm), (other.params, other.opt_state, other.gradient_norm)
    )


def test_a_checkpoint_holds_what_the_guard_knows(learner, warm, tmp_path):
    state, _ = update(learner, warm, scaled(batch_of(7), 1e4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(int(state.step), learner.changing(state), {})
    restored, _ = checkpoints.restore(int(state.step), learner.changing(learner.abstract_state))
    checkpoints.close()
    assert_same_bits((restored.skipped, restored.gradient_norm), (state.skipped, state.gradient_norm))
    assert restored.skipped == 1
