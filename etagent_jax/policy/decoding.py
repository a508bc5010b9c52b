"""The compiled parts of the embedded engine: the decode loop, prefill, copying a cached prefix, and scoring.

Shapes: B slots, S positions of a slot, C tokens of a prefill chunk, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from etagent_jax.model.transformer import Cache, Transformer

Array = Any  # NumPy on the host, jax.Array in the loop


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    """What the loop knows of each slot.  A slot's tokens below `known` are given or were sampled.

    Position p is processed when its keys and values are cached; `position` is the next one.  While
    p + 1 < known the loop only fills the cache (prompts, tool results); at p + 1 == known it samples.
    """

    tokens: Array  # [B, S] int32
    logprobs: Array  # [B, S] float32, of sampled tokens
    position: Array  # [B] int32
    known: Array  # [B] int32
    limit: Array  # [B] int32: `known` may not grow beyond it
    active: Array  # [B] bool
    stopped: Array  # [B] bool: ended by a stop string or end-of-sequence token
    stop_state: Array  # [B] int32
    temperature: Array  # [B] float32
    top_p: Array  # [B] float32
    seed: Array  # [B] uint32

    @classmethod
    def empty(cls, batch: int, size: int) -> "Slots":
        integers = lambda: np.zeros(batch, np.int32)
        flags = lambda: np.zeros(batch, bool)
        return cls(
            np.zeros((batch, size), np.int32), np.zeros((batch, size), np.float32), integers(), integers(),
            integers(), flags(), flags(), integers(), np.ones(batch, np.float32), np.ones(batch, np.float32),
            np.zeros(batch, np.uint32),
        )  # fmt: skip


class StopArrays(NamedTuple):
    """When to stop: the automaton's table [states, V] and accepting states (stops.py), the end tokens [V]."""

    table: Array
    accepts: Array
    is_eos: Array


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] outside the smallest set of tokens whose probability reaches top_p [B] become −∞."""
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1) - jax.nn.softmax(descending, axis=-1)
    threshold = jnp.min(jnp.where(before < top_p[:, None], descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _sample(logits: jax.Array, slots: Slots) -> tuple[jax.Array, jax.Array]:
    """logits [B, V] → token [B] and its log-probability [B] at the sampling temperature.

    The Gumbel noise of a draw depends on the slot's seed and position alone, so a trajectory does
    not depend on what else is in the batch.
    """
    greedy = slots.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, slots.temperature)[:, None]
    allowed = jax.lax.cond(jnp.any(slots.top_p < 1), lambda: _keep_top_p(scaled, slots.top_p), lambda: scaled)
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        slots.seed, slots.position
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    token = jnp.argmax(jnp.where(greedy[:, None], logits, allowed + noise), axis=-1).astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), token[:, None], axis=-1)[:, 0]
    return token, logprob


@functools.partial(jax.jit, donate_argnums=1, static_argnames=("max_steps",))
def decode(
    model: Transformer,
    cache: Cache,
    slots: Slots,
    stops: StopArrays,
    return_after: Array,
    max_steps: int,
) -> tuple[Cache, Slots]:
    """Advance every active slot until `return_after` of them have finished, or `max_steps` times."""
    batch, size = slots.tokens.shape
    rows = jnp.arange(batch)

    def step(carry: tuple[Cache, Slots, jax.Array, jax.Array]) -> tuple[Cache, Slots, jax.Array, jax.Array]:
        cache, s, steps, finished = carry
        token = s.tokens[rows, s.position]
        hidden, cache = model.extend(token[:, None], jnp.where(s.active, s.position, size)[:, None], cache)
        sampled, logprob = _sample(model.logits(hidden[:, 0]), s)

        following = s.position + 1
        samples = s.active & (following == s.known)
        at = jnp.where(samples, following, size)
        known = s.known + samples
        stop_state = jnp.where(samples, stops.table[s.stop_state, sampled], s.stop_state)
        stopped = samples & (stops.accepts[stop_state] | stops.is_eos[sampled])
        active = s.active & ~stopped & ~(samples & (known >= s.limit))
        finished = finished + jnp.sum(s.active & ~active)
        s = Slots(
            tokens=s.tokens.at[rows, at].set(sampled, mode="drop"),
            logprobs=s.logprobs.at[rows, at].set(logprob, mode="drop"),
            position=jnp.where(s.active, following, s.position),
            known=known,
            limit=s.limit,
            active=active,
            stopped=s.stopped | stopped,
            stop_state=stop_state,
            temperature=s.temperature,
            top_p=s.top_p,
            seed=s.seed,
        )
        return cache, s, steps + 1, finished

    def goes_on(carry: tuple[Cache, Slots, jax.Array, jax.Array]) -> jax.Array:
        _, s, steps, finished = carry
        return (steps < max_steps) & (finished < return_after) & jnp.any(s.active)

    stops, slots = jax.tree.map(jnp.asarray, (stops, slots))
    cache, slots, _, _ = jax.lax.while_loop(goes_on, step, (cache, slots, jnp.int32(0), jnp.int32(0)))
    return cache, slots


@functools.partial(jax.jit, donate_argnums=1, static_argnames=("chunk",))
def prefill(model: Transformer, cache: Cache, slot: int, tokens: Array, start: int, end: int, chunk: int) -> Cache:
    """Put the keys and values of tokens [S] from position `start` up to `end` into one slot's cache.

    `chunk` tokens at a time; `end - start` is a multiple of it.
    """
    tokens = jnp.asarray(tokens)

    def step(carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        row, at = carry
        positions = at + jnp.arange(chunk)
        _, row = model.extend(jax.lax.dynamic_slice_in_dim(tokens, at, chunk)[None], positions[None], row)
        return row, at + chunk

    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), cache)
    row, _ = jax.lax.while_loop(lambda carry: carry[1] < end, step, (row, jnp.int32(start)))
    return jax.tree.map(lambda x, r: jax.lax.dynamic_update_slice_in_dim(x, r, slot, 0), cache, row)


SCORED_AT_ONCE = 128
"""Tokens whose logits are held together: 78 MB at a vocabulary of 152,064."""


@jax.jit
def score(model: Transformer, tokens: Array, count: Array) -> jax.Array:
    """float32 [S]: at t, the log-probability of tokens[t + 1] given those up to t, for t < count - 1.

    tokens [S + 1], of which `count` are given; S is a multiple of SCORED_AT_ONCE.  The sequence has a
    cache of its own, and runs alone, so that its numbers depend on nothing else.
    """
    size = tokens.shape[0] - 1

    def step(carry: tuple[Cache, jax.Array, jax.Array]) -> tuple[Cache, jax.Array, jax.Array]:
        cache, logprobs, at = carry
        given, following = (jax.lax.dynamic_slice_in_dim(tokens, at + i, SCORED_AT_ONCE) for i in (0, 1))
        hidden, cache = model.extend(given[None], (at + jnp.arange(SCORED_AT_ONCE))[None], cache)
        logits = model.logits(hidden[0])
        chosen = jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
        scores = chosen - jax.nn.logsumexp(logits, axis=-1)
        return cache, jax.lax.dynamic_update_slice_in_dim(logprobs, scores, at, 0), at + SCORED_AT_ONCE

    start = (model.empty_cache(1, size), jnp.zeros(size), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry[2] < count - 1, step, start)[1]


@functools.partial(jax.jit, donate_argnums=0)
def copy_slot(cache: Cache, source: int, target: int) -> Cache:
    """The cache with slot `target` holding what slot `source` holds."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(x, source, 1), target, 0), cache
    )
