"""The decoder-only transformer of the Qwen2 and Qwen3 families, in Flax NNX, layers scanned.

Shapes: B rows, T tokens of a row, D hidden size, N query heads, K key/value heads, H head size,
F feed-forward size, V vocabulary, L layers, S cache positions.  Inside a layer the hidden states of
all tokens are one matrix [B·T, D], so that no product and no gradient needs a transposed copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from etagent_jax.model import attention

Remat = Literal["none", "dots", "full"]
REMAT_POLICIES: dict[Remat, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model.  qkv_bias as in Qwen2, qk_norm as in Qwen3; dtype of parameters and activations."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = True
    max_position: int = 32_768
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


Cache = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of every layer, each [B, K, S, H]."""


def param(
    init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str, rngs: nnx.Rngs
) -> nnx.Param:
    """A parameter whose metadata names its logical axes (see learner/mesh.py).

    Layers are stacked: their arrays have one leading axis more than `axes` names.
    """
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (RoFormer, eq. 34, halves as in Hugging Face): x [B, T, N, H], positions [B, T]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, axes: tuple[str | None, ...], dtype: str, rngs: nnx.Rngs):
        self.scale = param(nnx.initializers.ones, (size,), axes, dtype, rngs)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class Linear(nnx.Module):
    """x [..., in] → [..., out]; the kernel is [in, out]."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str, str], config: ModelConfig, rngs: nnx.Rngs, bias: bool = False
    ):
        self.kernel = param(nnx.initializers.normal(shape[0] ** -0.5), shape, axes, config.dtype, rngs)
        self.bias = param(nnx.initializers.zeros, shape[1:], axes[1:], config.dtype, rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.query = Linear((c.hidden_size, queries), ("embed", "heads"), c, rngs, bias=c.qkv_bias)
        self.key = Linear((c.hidden_size, keys), ("embed", "kv_heads"), c, rngs, bias=c.qkv_bias)
        self.value = Linear((c.hidden_size, keys), ("embed", "kv_heads"), c, rngs, bias=c.qkv_bias)
        self.output = Linear((queries, c.hidden_size), ("heads", "embed"), c, rngs)
        self.query_norm = RMSNorm(c.head_dim, c.norm_eps, ("head_dim",), c.dtype, rngs) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, c.norm_eps, ("head_dim",), c.dtype, rngs) if c.qk_norm else None
        self.head_dim, self.theta = c.head_dim, c.rope_theta

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B·T, D], positions [B, T] → query [B, T, N, H], key and value [B, T, K, H], positions applied."""
        query, key, value = (
            layer(x).reshape(*positions.shape, -1, self.head_dim) for layer in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, positions, self.theta), rotate(key, positions, self.theta), value

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        query, key, value = self.project(x, positions)
        return self.output(attention.attend(query, key, value, mask).reshape(x.shape[0], -1))

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `__call__`, for tokens whose keys and values join the cache at their positions."""
        query, key, value = self.project(x, positions)
        rows = jnp.arange(positions.shape[0])[:, None]
        keys = cache[0].at[rows, :, positions].set(key, mode="drop")
        values = cache[1].at[rows, :, positions].set(value, mode="drop")
        out = attention.attend_cache(query, keys, values, positions)
        return self.output(out.reshape(x.shape[0], -1)), (keys, values)


class FeedForward(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.gate = Linear((c.hidden_size, c.intermediate_size), ("embed", "mlp"), c, rngs)
        self.up = Linear((c.hidden_size, c.intermediate_size), ("embed", "mlp"), c, rngs)
        self.down = Linear((c.intermediate_size, c.hidden_size), ("mlp", "embed"), c, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps, ("embed",), c.dtype, rngs)
        self.attention = Attention(c, rngs)
        self.feed_forward_norm = RMSNorm(c.hidden_size, c.norm_eps, ("embed",), c.dtype, rngs)
        self.feed_forward = FeedForward(c, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, cache = self.attention.extend(self.attention_norm(x), positions, cache)
        x = x + out
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Transformer(nnx.Module):
    """Token ids in, hidden states out; `logits` is apart, so that a loss need not hold them all.

    remat: what the backward pass recomputes: nothing, all but matrix products, or whole layers.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, remat: Remat = "none"):
        c = config
        self.config = c
        self.remat: Remat = remat
        self.embedding = param(
            nnx.initializers.normal(0.02), (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.dtype, rngs
        )

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(c, rngs)

        self.layers = make_layers(rngs)
        self.norm = RMSNorm(c.hidden_size, c.norm_eps, ("embed",), c.dtype, rngs)
        self.head = None if c.tie_embeddings else Linear((c.hidden_size, c.vocab_size), ("embed", "vocab"), c, rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """tokens, positions, segment_ids [B, T] int32 → hidden states [B, T, D], the last norm applied.

        Several sequences may share a row: each has its own segment id (0 is padding) and its own
        positions from 0.
        """
        mask = attention.packed_mask(segment_ids)

        def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return layer(x, positions, mask), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, self.embed(tokens), self.layers)
        return self.norm(x).reshape(*tokens.shape, -1)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] → [B·T, D]."""
        return self.embedding[...][tokens.reshape(-1)]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] → float32 logits [..., V]."""
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        return (hidden @ self.embedding[...].T).astype(jnp.float32)

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Process tokens [B, T] at `positions` [B, T], given the cache of what stands before them.

        Positions of a row ascend; one ≥ S is neither stored nor meaningful (an idle slot).
        Returns hidden states [B, T, D] and the cache with the new tokens in it.
        """
        x = self.embed(tokens)
        grown = []
        for i, layer_cache in enumerate(cache):
            layer = jax.tree.map(lambda p, i=i: p[i], self.layers)
            x, layer_cache = layer.extend(x, positions, layer_cache)
            grown.append(layer_cache)
        return self.norm(x).reshape(*tokens.shape, -1), tuple(grown)

    def empty_cache(self, batch: int, size: int) -> Cache:
        shape = (batch, self.config.num_kv_heads, size, self.config.head_dim)
        zeros = lambda: jnp.zeros(shape, self.config.dtype)
        return tuple((zeros(), zeros()) for _ in range(self.config.num_layers))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of a model, from its shape alone."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
