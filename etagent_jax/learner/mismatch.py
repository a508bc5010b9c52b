"""How far the sampler's log-probabilities lie from the learner's, in an update and in each of its sequences.

Shapes: R rows, T tokens of a row.  The gap of a token is d = ℓ_old - ℓ_sampler, of the learner's weights before
the update and of the sampler.  It is not 0 where another engine or other weights have sampled the token.
"""

import math

import jax
import jax.numpy as jnp

from etagent_jax.data.packing import Batch
from etagent_jax.learner.losses import MAX_LOG_RATIO, Metrics

AFTER_TOOL = 8
"""How many tokens of a turn count as right after the tool result before it."""


def sampler_gap(batch: Batch, old_logprobs: jax.Array, token_count: jax.Array) -> Metrics:
    """Measures of the gap over the `token_count` tokens that bear loss: all 0 if sampler and learner agree.

    sampler_gap_mean, sampler_gap_max: of |d|.
    sampler_k3: mean of exp(d) - 1 - d, never negative; over tokens drawn by the sampler it estimates
    KL(sampler ‖ learner) without bias (k3 of Schulman, "Approximating KL divergence", 2020).  d is limited to ±20.
    sampler_gap_after_tool: mean |d| of the first tokens after a tool result (see `after_tool`); 0 if there are none.
    """
    gap = jnp.where(batch.loss_mask, old_logprobs - batch.sampler_logprobs, 0)
    limited = jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    right_after = after_tool(batch)
    size = jnp.abs(gap)
    return {
        "sampler_gap_mean": size.sum() / token_count,
        "sampler_gap_max": size.max(),
        "sampler_k3": (jnp.expm1(limited) - limited).sum() / token_count,
        "sampler_gap_after_tool": jnp.where(right_after, size, 0).sum() / jnp.maximum(right_after.sum(), 1),
    }


def agrees(batch: Batch, old_logprobs: jax.Array, max_weight: float) -> jax.Array:
    """Whether the geometric mean of a token's sequence's importance weights is in [1 / max_weight, max_weight].

    That mean is exp(mean d) over the tokens of the sequence that bear loss: the length-normalised ratio of GSPO
    (arXiv 2507.18071, eq. 7), here between sampler and learner, as in the geometric masks of Liu, Li et al.,
    "When Speed Kills Stability" (2025).  bool [R, T]; all tokens of a sequence are alike.
    """
    gap = jnp.where(batch.loss_mask, old_logprobs - batch.sampler_logprobs, 0)
    tokens = sequence_sums(batch.loss_mask.astype(jnp.float32), batch.segment_ids)
    return jnp.abs(sequence_sums(gap, batch.segment_ids)) <= math.log(max_weight) * tokens


def after_tool(batch: Batch, first: int = AFTER_TOOL) -> jax.Array:
    """The `first` tokens of every stretch that bears loss, except a sequence's first stretch: bool [R, T].

    Between two stretches stands what the model did not write: in a rollout a tool result.
    """
    mask, begins = batch.loss_mask, first_tokens(batch.segment_ids)
    starts = mask & ~jnp.roll(mask, 1, axis=1)
    place = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    since_start = place - jax.lax.cummax(jnp.where(starts, place, -1), axis=1)
    stretches = jnp.cumsum(starts, axis=1)
    before_sequence = jax.lax.cummax(jnp.where(begins, stretches, 0), axis=1)
    return mask & (since_start < first) & (stretches - before_sequence > 1)


def first_tokens(segment_ids: jax.Array) -> jax.Array:
    """Where a sequence begins, or the padding: bool [R, T]."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def sequence_sums(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """At every token the sum of `values`, float32 [R, T], over its sequence.

    A scan that begins anew at each sequence: the sum does not depend on what else is in the row, and unlike a
    scatter's it is the same on every device that computes it.
    """
    begins = first_tokens(segment_ids)

    def add(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    sums, _ = jax.lax.associative_scan(add, (values, begins), axis=1)
    place = jnp.broadcast_to(jnp.arange(values.shape[1]), values.shape)
    ends = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, place, values.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(sums, last, axis=1)
