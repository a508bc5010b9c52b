"""The transformer against transformers (torch), on random weights, through a Hugging Face folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from etagent_jax.model import weights
from etagent_jax.model.transformer import ModelConfig, Transformer, count_parameters

QWEN3 = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
                    head_dim=32, rope_theta=1e6)  # fmt: skip
QWEN2 = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
                    head_dim=16, rope_theta=1e4, qkv_bias=True, qk_norm=False, tie_embeddings=False)  # fmt: skip


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter away from its initial value, so that norms and biases matter."""
    model = Transformer(config, nnx.Rngs(seed))
    state = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    nnx.update(
        model, tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    )
    return model


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 97, (batch, length)).astype(np.int32)


def forward(model: Transformer, ids: np.ndarray) -> np.ndarray:
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (ids.shape[0], 1))
    return np.asarray(model.logits(model(ids, positions, np.ones_like(ids))))


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("theta", [1e4, 5e6])
def test_logits_and_gradients_agree_with_transformers(config, theta, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = ModelConfig(**{**config.__dict__, "rope_theta": theta})
    model = random_model(config)
    weights.save(model, tmp_path, eos_id=1, pad_id=0)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens(2, 40)
    expected = reference(torch.tensor(ids, dtype=torch.long)).logits
    np.testing.assert_allclose(forward(model, ids), expected.detach().numpy(), atol=2e-5)

    def loss(model: Transformer) -> jax.Array:
        positions = jnp.tile(jnp.arange(40), (2, 1))
        logprobs = jax.nn.log_softmax(model.logits(model(ids, positions, jnp.ones((2, 40), jnp.int32))))
        return -jnp.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], -1).mean()

    grads = nnx.grad(loss)(model)
    reference(torch.tensor(ids, dtype=torch.long), labels=torch.tensor(ids, dtype=torch.long)).loss.backward()
    kernel = np.asarray(grads["layers"]["attention"]["query"]["kernel"][...])[1].T
    expected_kernel = reference.model.layers[1].self_attn.q_proj.weight.grad.numpy()
    np.testing.assert_allclose(kernel, expected_kernel, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_folder_round_trip_is_exact(config, tmp_path):
    model = random_model(config)
    weights.save(model, tmp_path, eos_id=1, pad_id=0)
    again = weights.load(tmp_path)
    assert again.config == config
    before, after = jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again))
    assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(before, after, strict=True))
    assert count_parameters(config) == sum(x.size for x in before)


def test_packed_sequences_do_not_see_each_other():
    model = random_model(QWEN3)
    first, second = tokens(1, 7)[0], tokens(1, 12)[0][::-1]
    row = np.concatenate([first, second, [0]])[None]
    positions = np.concatenate([np.arange(7), np.arange(12), [0]])[None].astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 12 + [0]], np.int32)
    packed = np.asarray(model.logits(model(row, positions, segments)))[0]
    np.testing.assert_allclose(packed[:7], forward(model, first[None])[0], atol=1e-5)
    np.testing.assert_allclose(packed[7:19], forward(model, second[None])[0], atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    plain, saved = random_model(QWEN3), random_model(QWEN3)
    saved.remat = remat
    ids = tokens(2, 16)
    np.testing.assert_allclose(forward(plain, ids), forward(saved, ids), atol=1e-6)


def test_extending_a_cache_equals_one_pass():
    model = random_model(QWEN3)
    ids = tokens(2, 20)
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    cache = model.empty_cache(2, 32)
    parts = []
    for start, end in ((0, 11), (11, 12), (12, 20)):
        hidden, cache = model.extend(ids[:, start:end], positions[:, start:end], cache)
        parts.append(model.logits(hidden))
    np.testing.assert_allclose(np.concatenate(parts, 1), forward(model, ids), atol=1e-5)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load(tmp_path)
    weights.save(random_model(QWEN3), tmp_path, eos_id=1, pad_id=0)
    config = tmp_path / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"hidden_size": 64', '"hidden_size": 72'))
    with pytest.raises(ValueError, match="has shape"):
        weights.load(tmp_path)
    config.write_text(good.replace("Qwen3ForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not one of Qwen2"):
        weights.load(tmp_path)
    config.write_text(good)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights.load(tmp_path)
