"""Small models of every family, with random weights."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from etagent_jax.model import weights
from etagent_jax.model.rotary import Llama3Scaling
from etagent_jax.model.transformer import ModelConfig, Transformer

VOCABULARY = 97
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)

QWEN3 = ModelConfig(VOCABULARY, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2,
                    head_dim=32, max_position=131_072)  # fmt: skip
QWEN2 = dataclasses.replace(QWEN3, family="qwen2", head_dim=16)
LLAMA = dataclasses.replace(QWEN3, family="llama", rope_theta=5e5, rope_scaling=SCALING, head_dim=16)

FAMILIES = {
    "qwen2 tied": QWEN2,
    "qwen2 untied": dataclasses.replace(QWEN2, tie_embeddings=False),
    "qwen3 tied": QWEN3,
    "qwen3 untied, biases": dataclasses.replace(QWEN3, tie_embeddings=False, attention_bias=True),
    "llama tied": LLAMA,
    "llama untied": dataclasses.replace(LLAMA, tie_embeddings=False),
    "llama unscaled, biases": dataclasses.replace(LLAMA, rope_scaling=None, attention_bias=True, mlp_bias=True),
}


def random_params(config: ModelConfig, seed: int = 0, deviation: float = 0.05) -> weights.Params:
    """Kernels, embeddings and biases about 0, scales about 1: no parameter is without effect."""
    rng = np.random.default_rng(seed)
    return unflatten_dict(
        {
            name: jax.numpy.asarray((name[-1] == "scale") + deviation * rng.standard_normal(leaf.shape), leaf.dtype)
            for name, leaf in flatten_dict(weights.abstract_params(config)).items()
        }
    )


def as_model(config: ModelConfig, params: weights.Params) -> Transformer:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return nnx.merge(graph, params)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    return as_model(config, random_params(config, seed))


def random_folder(config: ModelConfig, folder: Path, seed: int = 0, **options: int) -> weights.Params:
    """A Hugging Face folder of such a model; returns the parameters in it."""
    params = random_params(config, seed)
    weights.save(params, config, folder, eos_ids=(1,), pad_id=0, **options)
    return params
