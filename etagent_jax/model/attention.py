"""Grouped-query attention over packed rows and over a key/value cache."""

import jax
import jax.numpy as jnp


def packed_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids → [B, 1, T, T] bool: token i sees the tokens j ≤ i of its own segment."""
    length = segment_ids.shape[-1]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """query [B, T, N, H], key and value [B, T, K, H], mask [B, 1, T, T] → [B, T, N, H]."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    """query [B, T, N, H] at `positions` [B, T] against a cache [B, K, S, H] → [B, T, N, H].

    The cache entry s holds the token at position s; a query sees s ≤ its own position.  Softmax in
    float32.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    seen = jnp.arange(size) <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights, value).reshape(batch, length, heads, head_dim)
