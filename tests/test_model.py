"""The transformer against transformers (torch), on random weights, through a Hugging Face folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from etagent_jax.model import weights
from etagent_jax.model.transformer import Execution, ModelConfig, Transformer, count_parameters
from tests.families import FAMILIES, LLAMA, QWEN2, QWEN3, VOCABULARY, as_model, random_folder, random_model

every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
one_of_each = pytest.mark.parametrize("config", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])


def tokens(batch: int, length: int) -> np.ndarray:
    """No token 0: as the padding it has no gradient in transformers."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (batch, length)).astype(np.int32)


def forward(model: Transformer, ids: np.ndarray, first: int = 0) -> np.ndarray:
    positions = np.tile(np.arange(first, first + ids.shape[1], dtype=np.int32), (ids.shape[0], 1))
    return np.asarray(jax.jit(lambda model: model.logits(model(ids, positions, np.ones_like(ids))))(model))


def reference(folder, dtype: str = "float32"):
    """The model in `folder` as transformers has it."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    model, problems = model
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def reference_logits(model, ids: np.ndarray, first: int = 0) -> np.ndarray:
    import torch

    with torch.no_grad():
        positions = torch.arange(first, first + ids.shape[1])[None]
        return model(torch.tensor(ids, dtype=torch.long), position_ids=positions).logits.float().numpy()


@every_family
def test_logits_agree_with_transformers(config, tmp_path):
    params = random_folder(config, tmp_path)
    ids = tokens(2, 40)
    expected = reference_logits(reference(tmp_path), ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(forward(as_model(config, params), ids), expected, rtol=0, atol=1e-5)


@one_of_each
@pytest.mark.parametrize("first", [8_192, 100_000])
def test_logits_agree_at_long_positions(config, first, tmp_path):
    params = random_folder(config, tmp_path)
    ids = tokens(1, 40)
    expected = reference_logits(reference(tmp_path), ids, first)
    np.testing.assert_allclose(forward(as_model(config, params), ids, first), expected, rtol=0, atol=1e-5)


@one_of_each
def test_rope_theta_is_heeded(config, tmp_path):
    ids, ours = tokens(1, 64), []
    for theta in (1e4, 1e6, 5e6):
        params = random_folder(dataclasses.replace(config, rope_theta=theta), tmp_path)
        model = as_model(weights.read_config(tmp_path), params)
        ours.append(forward(model, ids))
        np.testing.assert_allclose(ours[-1], reference_logits(reference(tmp_path), ids), rtol=0, atol=1e-5)
    assert all(np.abs(ours[i] - ours[j]).max() > 1e-3 for i, j in ((0, 1), (1, 2), (0, 2)))


def test_rope_scaling_is_heeded():
    ids = tokens(1, 64)
    plain = dataclasses.replace(LLAMA, rope_scaling=None)
    assert np.abs(forward(random_model(LLAMA), ids) - forward(random_model(plain), ids)).max() > 1e-3


@every_family
def test_gradients_of_every_parameter_agree_with_transformers(config, tmp_path):
    """Of both, float32 rounding leaves as much as 2e-6 of a gradient's norm: the judge is torch in float64."""
    import torch

    params = random_folder(config, tmp_path)
    ids = tokens(2, 40)
    long = torch.tensor(ids, dtype=torch.long)
    judge = reference(tmp_path, "float64")
    judge(long, labels=long).loss.backward()
    expected = {key: parameter.grad.numpy() for key, parameter in judge.named_parameters()}

    def loss(params: weights.Params) -> jax.Array:
        model = as_model(config, params)
        logits = model.logits(model(ids, jnp.tile(jnp.arange(40), (2, 1)), jnp.ones((2, 40), jnp.int32)))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], ids[:, 1:, None], -1).mean()

    difference = {}
    for name, gradient in flatten_dict(jax.jit(jax.grad(loss))(params)).items():
        keys = weights.folder_keys(name, config.num_layers)
        for key, ours in zip(keys, gradient if name[0] == "layers" else [gradient], strict=True):
            ours = np.asarray(ours.T if name[-1] == "kernel" else ours, np.float64)
            difference[key] = np.linalg.norm(ours - expected[key])
    assert difference.keys() == expected.keys()
    norms = {key: np.linalg.norm(gradient) for key, gradient in expected.items()}
    relative = {key: difference[key] / norm for key, norm in norms.items()}
    assert max(relative.values()) < 3e-6, max(relative.items(), key=lambda item: item[1])
    assert np.linalg.norm(list(difference.values())) < 1e-6 * np.linalg.norm(list(norms.values()))


@every_family
def test_greedy_decoding_agrees_token_for_token(config, tmp_path):
    import torch

    params = random_folder(config, tmp_path)
    prompt, new = tokens(1, 12), 30
    judge = reference(tmp_path)
    generated = judge.generate(torch.tensor(prompt, dtype=torch.long), max_new_tokens=new, min_new_tokens=new,
                               do_sample=False, eos_token_id=None)  # fmt: skip
    model = as_model(config, params)
    extend = jax.jit(Transformer.extend)
    cache, ours, fresh = model.empty_cache(1, 64), prompt, prompt
    for _ in range(new):
        positions = np.arange(ours.shape[1] - fresh.shape[1], ours.shape[1], dtype=np.int32)[None]
        hidden, cache = extend(model, fresh, positions, cache)
        fresh = np.asarray(model.logits(hidden[:, -1]).argmax(-1), np.int32)[None]
        ours = np.concatenate([ours, fresh], 1)
    assert ours.tolist() == generated.tolist()


@one_of_each
def test_bfloat16_drifts_no_further_than_in_transformers(config, tmp_path):
    params = random_folder(dataclasses.replace(config, dtype="bfloat16"), tmp_path)
    ids = tokens(2, 64)
    exact = forward(weights.load(tmp_path, "float32"), ids)
    ours, theirs = forward(weights.load(tmp_path), ids), reference_logits(reference(tmp_path, "bfloat16"), ids)
    assert not np.array_equal(ours, exact)
    for measure in (np.median, np.max):
        assert measure(np.abs(ours - exact)) < 1.1 * measure(np.abs(theirs - exact))
    assert params["embedding"].dtype == jnp.float32  # what was saved; the folder is bfloat16


def test_float32_masters_compute_as_their_bfloat16_copies(tmp_path):
    random_folder(dataclasses.replace(QWEN3, dtype="bfloat16"), tmp_path)
    config = weights.read_config(tmp_path)
    masters = dataclasses.replace(config, param_dtype="float32")
    params = weights.load_params(tmp_path, masters)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    ids = tokens(1, 20)
    np.testing.assert_array_equal(forward(as_model(masters, params), ids), forward(weights.load(tmp_path), ids))


@every_family
def test_parameters_are_counted_from_the_shape(config):
    assert count_parameters(config) == sum(x.size for x in jax.tree.leaves(random_model(config)))


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
    saved.execution = Execution(remat=remat)
    ids = tokens(2, 16)
    gradient = jax.jit(jax.grad(lambda model: model.logits(model(ids, ids * 0, ids * 0 + 1)).max()))
    for x, y in zip(jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(saved)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_extending_a_cache_equals_one_pass():
    model = random_model(QWEN3)
    extend = jax.jit(Transformer.extend)
    ids = tokens(2, 20)
    positions = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    cache = model.empty_cache(2, 32)
    parts = []
    for start, end in ((0, 11), (11, 12), (12, 20)):
        hidden, cache = extend(model, ids[:, start:end], positions[:, start:end], cache)
        parts.append(model.logits(hidden))
    np.testing.assert_allclose(np.concatenate(parts, 1), forward(model, ids), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"family": "gpt2"}, "family must be one of qwen2, qwen3, llama"),
        ({"family": "qwen2", "attention_bias": True}, "Qwen2 has biases on query, key and value always"),
        ({"mlp_bias": True}, "the family qwen3 has none"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**{**QWEN3.__dict__, **change})
