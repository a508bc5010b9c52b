"""The decoder-only transformer of the Qwen2, Qwen3 and Llama families, in Flax NNX, layers scanned.

Shapes: B rows, T tokens of a row, D hidden size, N query heads, K key/value heads, H head size,
F feed-forward size, V vocabulary, L layers, S cache positions.  Inside a layer the hidden states of
all tokens are one matrix [B·T, D], so that no product and no gradient needs a transposed copy.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from etagent_jax.model import attention
from etagent_jax.model.cache_attention import attend_cache
from etagent_jax.model.lora import Lora, Target
from etagent_jax.model.rotary import Llama3Scaling, Rotation, frequencies, rotate, rotation

Family = Literal["qwen2", "qwen3", "llama"]

Remat = Literal["none", "dots", "full"]
REMAT_POLICIES: dict[Remat, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model.

    family: Qwen2 (and 2.5) has biases on query, key and value; Qwen3 norms on query and key; Llama neither.
    attention_bias, mlp_bias: biases on all four projections of attention, on all three of the feed-forward.
    dtype: of activations and matrix products, and of the folder the model is written to.
    param_dtype: what the parameters are kept in; they are cast to `dtype` where they are used.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: Family = "qwen3"
    rope_theta: float = 1_000_000.0
    rope_scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position: int = 32_768
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.family not in get_args(Family):
            raise ValueError(f"family must be one of {', '.join(get_args(Family))}, got {self.family!r}")
        if self.family == "qwen2" and self.attention_bias:
            raise ValueError("attention_bias: Qwen2 has biases on query, key and value always, on the output never")
        if self.family != "llama" and self.mlp_bias:
            raise ValueError(f"mlp_bias: the family {self.family} has none in its feed-forward layers")

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2" or self.attention_bias

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def frequencies(self) -> np.ndarray:
        """Radians per position of the rotary embedding, float32 [H/2]."""
        return frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


def unconstrained(x: jax.Array) -> jax.Array:
    return x


def look_up(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of `table` [V, D] for `tokens` [B, T], as [B·T, D] of `dtype`."""
    return table[tokens.reshape(-1)].astype(dtype)


@dataclass(frozen=True)
class Execution:
    """How a model is computed; none of it changes what is computed.

    remat: what the backward pass recomputes: nothing, all but matrix products, or whole layers.
    attend: attention over packed rows.  look_up: rows of the embedding, see `look_up`.
    constrain: pins hidden states [B·T, D] to a mesh.
    """

    remat: Remat = "none"
    attend: attention.Attend = attention.xla
    look_up: Callable[[jax.Array, jax.Array, str], jax.Array] = look_up
    constrain: Callable[[jax.Array], jax.Array] = unconstrained


Cache = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of every layer, each [B, K, S, H]."""


def param(
    init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str, rngs: nnx.Rngs
) -> nnx.Param:
    """A parameter whose metadata names its logical axes (see learner/mesh.py).

    Layers are stacked: their arrays have one leading axis more than `axes` names.
    """
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, axes: tuple[str | None, ...], c: ModelConfig, rngs: nnx.Rngs):
        self.scale = param(nnx.initializers.ones, (size,), axes, c.param_dtype, rngs)
        self.eps = c.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * wide.astype(x.dtype)


class Linear(nnx.Module):
    """x [..., in] → [..., out]; the kernel is [in, out].  With `lora` a low-rank product is added (see lora.py)."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str, str], c: ModelConfig, rngs: nnx.Rngs,
        bias: bool = False, lora: Lora | None = None,
    ):  # fmt: skip
        random, zeros = nnx.initializers.normal(shape[0] ** -0.5), nnx.initializers.zeros
        self.kernel = param(random, shape, axes, c.param_dtype, rngs)
        self.bias = param(zeros, shape[1:], axes[1:], c.param_dtype, rngs) if bias else None
        self.lora = lora
        if lora is not None:
            self.lora_in = param(random, (shape[0], lora.rank), (axes[0], None), "float32", rngs)
            self.lora_out = param(zeros, (lora.rank, shape[1]), (None, axes[1]), "float32", rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora is not None:
            low = x @ self.lora_in[...].astype(x.dtype)
            y += self.lora.scale * (low @ self.lora_out[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, lora: dict[Target, Lora]):
        hidden, queries, keys = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.query = Linear((hidden, queries), ("embed", "heads"), c, rngs, c.qkv_bias, lora.get("query"))
        self.key = Linear((hidden, keys), ("embed", "kv_heads"), c, rngs, c.qkv_bias, lora.get("key"))
        self.value = Linear((hidden, keys), ("embed", "kv_heads"), c, rngs, c.qkv_bias, lora.get("value"))
        self.output = Linear((queries, hidden), ("heads", "embed"), c, rngs, c.attention_bias, lora.get("output"))
        self.query_norm = RMSNorm(c.head_dim, ("head_dim",), c, rngs) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, ("head_dim",), c, rngs) if c.qk_norm else None
        self.head_dim = c.head_dim

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B·T, D] → query [B, T, N, H], key and value [B, T, K, H], positions applied."""
        rows = rotation.sin.shape[:2]
        query, key, value = (layer(x).reshape(*rows, -1, self.head_dim) for layer in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Callable[..., jax.Array]) -> jax.Array:
        return self.output(attend(*self.project(x, rotation)).reshape(x.shape[0], -1))

    def extend(
        self, x: jax.Array, rotation: Rotation, positions: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `__call__`, for tokens whose keys and values join the cache at `positions` [B, T]."""
        query, key, value = self.project(x, rotation)
        rows = jnp.arange(positions.shape[0])[:, None]
        keys = cache[0].at[rows, :, positions].set(key, mode="drop")
        values = cache[1].at[rows, :, positions].set(value, mode="drop")
        out = attend_cache(query, keys, values, positions)
        return self.output(out.reshape(x.shape[0], -1)), (keys, values)


class FeedForward(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, lora: dict[Target, Lora]):
        inward, outward = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        self.gate = Linear(inward, ("embed", "mlp"), c, rngs, c.mlp_bias, lora.get("gate"))
        self.up = Linear(inward, ("embed", "mlp"), c, rngs, c.mlp_bias, lora.get("up"))
        self.down = Linear(outward, ("mlp", "embed"), c, rngs, c.mlp_bias, lora.get("down"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, lora: dict[Target, Lora]):
        self.attention_norm = RMSNorm(c.hidden_size, ("embed",), c, rngs)
        self.attention = Attention(c, rngs, lora)
        self.feed_forward_norm = RMSNorm(c.hidden_size, ("embed",), c, rngs)
        self.feed_forward = FeedForward(c, rngs, lora)

    def __call__(self, x: jax.Array, rotation: Rotation, attend: Callable[..., jax.Array]) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), rotation, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def extend(
        self, x: jax.Array, rotation: Rotation, positions: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, cache = self.attention.extend(self.attention_norm(x), rotation, positions, cache)
        x = x + out
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Transformer(nnx.Module):
    """Token ids in, hidden states out; `logits` is apart, so that a loss need not hold them all."""

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, execution: Execution | None = None, lora: Lora | None = None
    ):
        c = config
        self.config = c
        self.execution = execution or Execution()
        adapters = dict.fromkeys(lora.targets, lora) if lora is not None else {}
        self.embedding = param(
            nnx.initializers.normal(0.02), (c.vocab_size, c.hidden_size), ("vocab", "embed"), c.param_dtype, rngs
        )

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(c, rngs, adapters)

        self.layers = make_layers(rngs)
        self.norm = RMSNorm(c.hidden_size, ("embed",), c, rngs)
        self.head = None if c.tie_embeddings else Linear((c.hidden_size, c.vocab_size), ("embed", "vocab"), c, rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """tokens, positions, segment_ids [B, T] int32 → hidden states [B, T, D], the last norm applied.

        Several sequences may share a row: each has its own segment id (0 is padding) and its own
        positions from 0.
        """
        angles = rotation(positions, self.config.frequencies)
        execution = self.execution

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return execution.attend(query, key, value, segment_ids)

        def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return execution.constrain(layer(x, angles, attend)), None

        if execution.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[execution.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, execution.constrain(self.embed(tokens)), self.layers)
        return self.norm(x).reshape(*tokens.shape, -1)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] → [B·T, D]."""
        return self.execution.look_up(self.embedding[...], tokens, self.config.dtype)

    def output_kernel(self) -> jax.Array:
        """What hidden states are multiplied with to give logits: [D, V], in `config.dtype`."""
        kernel = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return kernel.astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] → float32 logits [..., V]."""
        return jnp.matmul(hidden, self.output_kernel(), preferred_element_type=jnp.float32)

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Process tokens [B, T] at `positions` [B, T], given the cache of what stands before them.

        Positions of a row ascend; one ≥ S is neither stored nor meaningful (an idle slot).
        Returns hidden states [B, T, D] and the cache with the new tokens in it.
        """
        x, angles = self.embed(tokens), rotation(positions, self.config.frequencies)
        grown = []
        for i, layer_cache in enumerate(cache):
            layer = jax.tree.map(lambda p, i=i: p[i], self.layers)
            x, layer_cache = layer.extend(x, angles, positions, layer_cache)
            grown.append(layer_cache)
        return self.norm(x).reshape(*tokens.shape, -1), tuple(grown)

    def empty_cache(self, batch: int, size: int) -> Cache:
        shape = (batch, self.config.num_kv_heads, size, self.config.head_dim)
        zeros = lambda: jnp.zeros(shape, self.config.dtype)
        return tuple((zeros(), zeros()) for _ in range(self.config.num_layers))


@functools.lru_cache
def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of a model, from its shape alone."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
