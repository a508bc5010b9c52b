"""What learns: adapters alone, all but what is frozen, float32 masters of a bfloat16 model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from etagent_jax.learner import losses, trainable
from etagent_jax.learner.checkpoint import Checkpoints
from etagent_jax.learner.step import Learner, token_count
from etagent_jax.model.lora import Lora
from tests.learning import ADAMW, CONFIG, POLICY, assert_same_bits, batch_of, calibrate, fine_tune, leaves

LORA = Lora(rank=3, alpha=6.0, targets=("query", "value", "down"))


@pytest.fixture(scope="module")
def adapting() -> Learner:
    return Learner(CONFIG, ADAMW, policy=POLICY, lora=LORA)


@pytest.fixture(scope="module")
def plain() -> Learner:
    return Learner(CONFIG, ADAMW, policy=POLICY)


def named(tree) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def stir(params, seed: int):
    """Adapters away from where they begin, at zero."""
    rng = np.random.default_rng(seed)
    move = lambda path, x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if "lora" in str(path[-1]) else x
    return jax.tree_util.tree_map_with_path(move, params)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [fine_tune, calibrate], ids=["sft", "policy"])
def test_only_the_adapters_learn(adapting, updates):
    before = named(adapting.init_state(0).params)
    state, history = updates(adapting, 3)
    after = named(state.params)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * len(LORA.targets)
    assert len(set(history)) == len(history)


def test_adapters_begin_by_changing_nothing(adapting, plain):
    params = adapting.init_state(0).params
    score, expected = adapting.score(params, batch_of(0)), plain.score(adapting.serving_params(params), batch_of(0))
    np.testing.assert_allclose(score[0], expected[0], atol=1e-6)


def test_merged_adapters_score_as_they_do_apart(adapting, plain):
    params = stir(adapting.init_state(0).params, 1)
    merged = adapting.serving_params(params)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract_state.params)
    apart, together = adapting.score(params, batch_of(0))[0], plain.score(merged, batch_of(0))[0]
    np.testing.assert_allclose(apart, together, atol=2e-5)
    assert (
        np.abs(np.asarray(apart) - np.asarray(adapting.score(adapting.init_state(0).params, batch_of(0))[0])).max()
        > 0.01
    )


def test_the_gradient_of_an_adapter_follows_from_that_of_its_kernel(adapting, plain):
    """With W' = W + s·A·B: dA = s·dW'·Bᵀ and dB = s·Aᵀ·dW'."""
    params, batch = stir(adapting.init_state(0).params, 1), batch_of(0)
    tokens = token_count(batch)
    gradients = jax.grad(lambda p: losses.sft_loss(adapting.model(p), batch, tokens)[0])(params)
    merged = adapting.serving_params(params)
    kernels = jax.grad(lambda p: losses.sft_loss(plain.model(p), batch, tokens)[0])(merged)
    there, whole, values = (x["layers"]["feed_forward"]["down"] for x in (gradients, kernels, params))
    for layer in range(CONFIG.num_layers):
        kernel = np.asarray(whole["kernel"][layer], np.float64)
        first, second = (np.asarray(values[name][layer], np.float64) for name in ("lora_in", "lora_out"))
        np.testing.assert_allclose(there["lora_in"][layer], LORA.scale * kernel @ second.T, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(there["lora_out"][layer], LORA.scale * first.T @ kernel, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_holds_the_adapters_alone_and_resumes_to_the_bit(adapting, tmp_path):
    straight, _ = fine_tune(adapting, 4)
    half, _ = fine_tune(adapting, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, adapting.changing(half), {})
    stored, _ = checkpoints.restore(2, adapting.changing(adapting.abstract_state))
    checkpoints.close()
    assert all("lora_" in name for name in named(stored.params))
    assert_same_bits(fine_tune(adapting, 2, adapting.resumed(stored, adapting.init_state(0)))[0], straight)


def test_adapters_of_a_bfloat16_model_are_float32_and_the_rest_is_not():
    learner = Learner(dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"), ADAMW, lora=LORA)
    for name, leaf in flatten_dict(learner.abstract_state.params, sep="/").items():
        assert leaf.dtype == ("float32" if "lora_" in name else "bfloat16"), name
    assert all(x.dtype == "bfloat16" for x in leaves(learner.serving_params(learner.init_state(0).params)))


def test_lora_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="targets must be some of query, key, value, output, gate, up, down"):
        Lora(4, 8.0, ("q_proj",))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Lora(0, 8.0)


# --- frozen parameters ----------------------------------------------------------------------------


def test_frozen_parameters_keep_their_bits_and_have_no_moments(plain):
    learner = Learner(CONFIG, ADAMW, frozen=("embedding", "layers/.*norm/scale"))
    size = sum(x.size for x in jax.tree.leaves(plain.abstract_state.opt_state))
    before = named(learner.init_state(0).params)
    state, _ = fine_tune(learner, 2)
    after = named(state.params)
    still = {name for name in before if (before[name] == after[name]).all()}
    assert "embedding" in still
    assert {name for name in before if name.startswith("layers") and "norm" in name} < still
    assert "norm/scale" not in still
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < size


def test_the_gradient_norm_is_of_what_learns(plain):
    everything = float(plain.sft_step(plain.init_state(0), batch_of(0))[1]["grad_norm"])
    parts = []
    for pattern in ("layers/.*", "(?!layers).*"):
        learner = Learner(CONFIG, ADAMW, frozen=(pattern,))
        parts.append(float(learner.sft_step(learner.init_state(0), batch_of(0))[1]["grad_norm"]))
    assert np.hypot(*parts) == pytest.approx(everything, rel=1e-5)


def test_a_learner_says_what_it_trains_and_how(plain, adapting):
    sizes = {
        learner: sum(x.size for x in jax.tree.leaves(learner.abstract_state.params)) for learner in (plain, adapting)
    }
    assert f"{sizes[plain]:,} parameters, of which {sizes[plain]:,} learn" in plain.summary
    assert f"of which {sizes[adapting] - sizes[plain]:,} learn" in adapting.summary
    assert "computed in float32, attention xla, remat none; mesh data" in plain.summary


@pytest.mark.parametrize(
    ("frozen", "message"),
    [(("layers/atention/.*",), "matches no parameter; there are embedding"), ((".*",), "nothing is left to learn"),
     (("layers/(",), "is not a regular expression")],
)  # fmt: skip
def test_wrong_frozen_patterns_are_named(plain, frozen, message):
    with pytest.raises(ValueError, match=message):
        trainable.learning_paths(plain.abstract_state.params, False, frozen)


# --- masters --------------------------------------------------------------------------------------


def test_a_bfloat16_model_learns_in_float32_masters():
    slow = dataclasses.replace(ADAMW, learning_rate=1e-6, warmup_steps=0)
    learner = Learner(dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"), slow)
    before = named(learner.init_state(0).params)
    state, _ = fine_tune(learner, 3)
    up = named(state.params)["layers/feed_forward/up/kernel"]
    assert up.dtype == np.float32
    moved = np.abs(up - before["layers/feed_forward/up/kernel"])
    assert (moved > 0).mean() > 0.99  # in bfloat16 a step of 1e-6 would be lost on all but the smallest
    rounded = np.asarray(learner.serving_params(state.params)["layers"]["feed_forward"]["up"]["kernel"])
    assert rounded.dtype == jnp.bfloat16
    assert (rounded == up.astype(jnp.bfloat16)).all()
    model = learner.model(state.params)
    hidden = model(*(jnp.zeros((1, 4), jnp.int32),) * 3)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32


def test_the_first_moment_may_be_bfloat16(plain):
    learner = Learner(CONFIG, dataclasses.replace(ADAMW, momentum_dtype="bfloat16"))
    state, history = fine_tune(learner, 5)
    np.testing.assert_allclose(history, fine_tune(plain, 5)[1], rtol=1e-3)
    assert {str(x.dtype) for x in leaves(state.opt_state) if x.ndim} == {"bfloat16", "float32"}
    with pytest.raises(ValueError, match="momentum_dtype must be float32 or bfloat16"):
        dataclasses.replace(ADAMW, momentum_dtype="float16")
