"""The shapes of published models, from their config.json files."""

from etagent_jax.model.rotary import Llama3Scaling
from etagent_jax.model.transformer import ModelConfig


def _qwen2(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int,
    vocab_size: int = 151_936, tie_embeddings: bool = True,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, hidden_size // num_heads,
        family="qwen2", tie_embeddings=tie_embeddings, dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip


SHAPES = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2),
    "qwen2.5-7b": _qwen2(3584, 18_944, 28, 28, 4, 152_064, tie_embeddings=False),
    "qwen2.5-14b": _qwen2(5120, 13_824, 48, 40, 8, 152_064, tie_embeddings=False),
    "qwen2.5-32b": _qwen2(5120, 27_648, 64, 40, 8, 152_064, tie_embeddings=False),
    "qwen3-8b": ModelConfig(
        151_936, 4096, 12_288, 36, 32, 8, 128,
        family="qwen3", tie_embeddings=False, max_position=40_960, dtype="bfloat16", param_dtype="bfloat16",
    ),
    "llama3.1-8b": ModelConfig(
        128_256, 4096, 14_336, 32, 32, 8, 128,
        family="llama", rope_theta=500_000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5,
        tie_embeddings=False, max_position=131_072, dtype="bfloat16", param_dtype="bfloat16",
    ),
}  # fmt: skip
"""By short name, as bfloat16: Qwen2.5 as its Instruct models, which share all shapes with the base models."""
