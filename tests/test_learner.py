"""The learner: losses against NumPy, optimizers against their definitions, steps that are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from etagent_jax.data.packing import Batch, pack
from etagent_jax.learner import losses
from etagent_jax.learner.losses import PolicyLossConfig
from etagent_jax.learner.optimizer import OptimizerConfig, learning_rate, make_optimizer
from etagent_jax.learner.step import Learner, check_finite
from etagent_jax.model import weights
from etagent_jax.model.transformer import Transformer
from tests.learning import (
    ADAMW,
    CONFIG,
    LENGTH,
    MUON,
    VOCABULARY,
    assert_same_bits,
    batch_of,
    fine_tune,
    leaves,
    sequences,
)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(CONFIG, ADAMW, policy=PolicyLossConfig(temperature=0.7))


@pytest.fixture(scope="module")
def muon_learner() -> Learner:
    return Learner(CONFIG, MUON)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return pack(sequences(14), LENGTH, rows=8)


# --- packed rows ----------------------------------------------------------------------------------


def test_a_packed_sequence_is_learned_as_if_it_were_alone(learner):
    model = learner.model(learner.init_state(0).params)
    some = sequences(3)
    together = pack(some, 64, rows=1)
    tokens = jnp.float32(together.loss_mask.sum())
    assert together.segment_ids.max() == 3

    def loss(model: Transformer, batch: Batch) -> jax.Array:
        return losses.sft_loss(model, batch, tokens)[0]

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    value, gradient = value_and_grad(model, together)
    alone = [value_and_grad(model, pack([s], 64)) for s in some]
    assert abs(value - sum(v for v, _ in alone)) < 1e-6
    summed = jax.tree.map(lambda *g: sum(g), *(g for _, g in alone))
    for a, b in zip(leaves(gradient), leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- the optimizer --------------------------------------------------------------------------------

TREE_AXES = {"kernel": P("layers", "embed", "mlp"), "bias": P("layers", "mlp"), "embedding": P("vocab", "embed")}


def small_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 8, 12), "bias": (3, 12), "embedding": (10, 8)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_the_schedule_warms_up_and_ends_where_it_should():
    cosine = learning_rate(OptimizerConfig(1.0, total_steps=100, warmup_steps=10, schedule="cosine"))
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(55), cosine(100)], [0.1, 1, 0.55, 0.1], rtol=1e-6)
    constant = learning_rate(OptimizerConfig(2.0, total_steps=100), scale=3.0)
    assert float(constant(0)) == float(constant(99)) == 6


def test_adamw_follows_its_definition_and_only_matrices_decay():
    config = OptimizerConfig(0.1, total_steps=9, weight_decay=0.5, clip_norm=2.0)
    optimizer = make_optimizer(config, TREE_AXES)
    params = small_tree(0)
    expected = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    state = optimizer.init(params)
    for t in (1, 2, 3):
        gradients = small_tree(t)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients.values()))
        for name, g in gradients.items():
            g = np.asarray(g, np.float64) * min(1, 2.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            move = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            decay = 0.5 if name == "kernel" else 0
            expected[name] -= 0.1 * (move + decay * expected[name])
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-5)


def test_muon_orthogonalises_each_layer_by_itself_and_leaves_the_rest_to_adam():
    config = OptimizerConfig(0.1, total_steps=9, name="muon", weight_decay=0.0, clip_norm=1e9, muon_scale=7.0)
    optimizer = make_optimizer(config, TREE_AXES)
    params, gradients = small_tree(0), small_tree(1)
    # Layer 1's gradient is tiny, which must not matter to its update.
    gradients["kernel"] = gradients["kernel"].at[1].multiply(1e-3)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for layer in range(3):
        u, _, vt = np.linalg.svd(np.asarray(gradients["kernel"][layer], np.float64), full_matrices=False)
        update = np.asarray(updates["kernel"][layer])
        singular = np.linalg.svd(update, compute_uv=False) / (0.7 * np.sqrt(12 / 8))
        assert (singular > 0.6).all()
        assert (singular < 1.3).all()
        assert (-update * (u @ vt)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ vt) > 0.95
    for name in ("bias", "embedding"):  # Adam's first step is the sign, Nesterov's a little longer
        ratio = -np.asarray(updates[name]) / np.sign(gradients[name]) / 0.1
        assert (ratio > 0.9).all()
        assert (ratio < 2).all()


# --- steps ----------------------------------------------------------------------------------------


def test_fine_tuning_learns_a_batch_by_heart(muon_learner, batch):
    state = muon_learner.init_state(0)
    for step in range(60):
        state, metrics = muon_learner.sft_step(state, batch)
        check_finite(metrics, step)
    assert metrics["accuracy"] > 0.9
    assert metrics["loss"] < np.log(VOCABULARY) / 2
    assert metrics["tokens"] == batch.loss_mask.sum()
    assert int(state.step) == 60
    assert muon_learner.compilations == 1


def test_micro_batches_change_nothing_but_rounding(learner):
    four = Learner(CONFIG, ADAMW, policy=learner.policy, micro_batches=4)
    (one_state, one), (four_state, split) = fine_tune(learner, 3), fine_tune(four, 3)
    np.testing.assert_allclose(one, split, rtol=1e-6)
    for a, b in zip(leaves(one_state.params), leaves(four_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    batch = batch_of(0)
    params = learner.init_state(1).params
    for a, b in zip(learner.score(params, batch), four.score(params, batch), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_update_that_is_not_finite_is_not_applied(learner, batch):
    state = learner.init_state(0)
    before = jax.tree.map(np.array, state)
    old = np.array(batch.sampler_logprobs)
    poisoned = dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.inf))
    state, metrics = learner.policy_step(state, poisoned, old, old)
    with pytest.raises(FloatingPointError, match=r"step 7: .*the update was not applied"):
        check_finite(metrics, step=7)
    assert_same_bits((state.params, state.opt_state), (before.params, before.opt_state))


def test_a_folder_is_read_into_a_state(learner, batch, tmp_path):
    model = Transformer(CONFIG, nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    weights.save(params, CONFIG, tmp_path, eos_ids=(1,), pad_id=0)
    state = learner.load_state(tmp_path)
    assert_same_bits(state.params, params)
    state, _ = learner.sft_step(state, batch)
    assert learner.model(state.params).embedding.shape == (VOCABULARY, 32)
    other = Learner(dataclasses.replace(CONFIG, num_layers=1), ADAMW)
    with pytest.raises(ValueError, match="num_layers=1"):
        other.load_state(tmp_path)


def test_rows_that_do_not_divide_are_an_error(batch):
    learner = Learner(CONFIG, ADAMW, micro_batches=3)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3 micro-batches over 1 devices"):
        learner.sft_step(learner.abstract_state, batch)
