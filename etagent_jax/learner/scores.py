"""Log-probability and entropy of every token, by chunks of the vocabulary: all logits never exist at once.

Shapes: R rows, T tokens of a row, N = R·T tokens, D hidden size, V vocabulary, C its part in a chunk;
inside of `shard_map`, R, D and V are what one device holds.

Chunks are of the vocabulary, not of tokens, because the gradient of a chunk of the table [V, D] is then
complete: it is reduced over the mesh once, and no float32 sum of the table's size is carried along.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from etagent_jax.data.packing import Batch
from etagent_jax.learner.mesh import ROWS, TABLE, make_mesh
from etagent_jax.model.transformer import Transformer

CHUNK_BYTES = 64 * 2**20
"""Of the float32 logits [N, C] that one device makes at a time."""


class TokenScores(NamedTuple):
    """Of each token, given those before it in its segment; 0 (False) for the first, and for padding.

    logprobs: float32 [R, T], natural.  entropy: float32 [R, T], in nats, of the distribution it was
    drawn from.  most_likely: bool [R, T], whether no other token was likelier.
    """

    logprobs: jax.Array
    entropy: jax.Array
    most_likely: jax.Array


def token_scores(model: Transformer, batch: Batch, temperature: float = 1.0, mesh: Mesh | None = None) -> TokenScores:
    """Score every token of the batch at the temperature it was sampled at.

    mesh: where rows and parameters lie (see mesh.py); None is one device.
    """
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
    hidden = model(batch.tokens, batch.positions, batch.segment_ids)
    following = jnp.roll(batch.tokens, -1, axis=1)
    scores = score_targets(hidden, model.output_kernel().T, following, temperature, mesh)
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
    align = lambda x: jnp.pad(jnp.where(same, x[:, :-1], 0), ((0, 0), (1, 0)))
    return TokenScores(*map(align, scores))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def score_targets(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    temperature: float,
    mesh: Mesh,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Scores of `targets` [R, T] under softmax(hidden [R, T, D] · table [V, D]ᵀ / temperature).

    Products are made in the dtype of `table` and accumulated in float32; all else is float32.  Entry
    [r, t] of the result speaks of targets[r, t].  Log-probabilities and entropies have gradients in
    `hidden` and `table`; the backward pass makes the logits again, and keeps numbers per token only.
    """
    return _forward(hidden, table, targets, temperature, mesh, chunk_bytes)[0]


class _Sums(NamedTuple):
    """Sums over the logits x of a part of the vocabulary, from which the parts merge; float32 [N]."""

    top: jax.Array  # max x
    total: jax.Array  # Σ exp(x - top)
    weighted: jax.Array  # Σ exp(x - top) (x - top)

    def below(self, top: jax.Array) -> "_Sums":
        """The same sums relative to a higher `top`."""
        fall = self.top - top
        kept = jnp.exp(fall)
        return _Sums(top, kept * self.total, kept * (self.weighted + fall * self.total))


def _forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, temperature: float, mesh: Mesh, chunk_bytes: int
) -> tuple[TokenScores, tuple[jax.Array, ...]]:
    def of_a_device(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> Any:
        states, wanted = _matrix(hidden), _row_of_table(targets, table)

        def add(carry: tuple[_Sums, jax.Array], start: Any, part: jax.Array) -> tuple[_Sums, jax.Array]:
            sums, chosen = carry
            logits = _logits(states, part, temperature)
            top, total, weighted = sums.below(jnp.maximum(sums.top, logits.max(axis=-1)))
            shifted = logits - top[:, None]
            exponentials = jnp.exp(shifted)
            total += exponentials.sum(axis=-1)
            weighted += (exponentials * shifted).sum(axis=-1)
            chosen += jnp.where(_is_entry(wanted - start, logits), logits, 0).sum(axis=-1)
            return _Sums(top, total, weighted), chosen

        zeros = jnp.zeros(wanted.shape, jnp.float32)
        nothing = _Sums(jnp.full_like(zeros, jnp.finfo(jnp.float32).min), zeros, zeros)
        sums, chosen = _over_chunks(add, (nothing, zeros), table, len(states), chunk_bytes)
        top = jax.lax.pmax(sums.top, "tensor")
        _, total, weighted = sums.below(top)
        total, weighted, chosen = jax.lax.psum((total, weighted, chosen), "tensor")
        log_total = jnp.log(total)
        scores = TokenScores(chosen - top - log_total, log_total - weighted / total, chosen >= top)
        return jax.tree.map(lambda x: x.reshape(targets.shape), (scores, top, log_total))

    scores, top, log_total = _on_mesh(of_a_device, mesh, (ROWS, TABLE, ROWS), ROWS)(hidden, table, targets)
    return scores, (hidden, table, targets, top, log_total, scores.entropy)


def _backward(
    temperature: float, mesh: Mesh, chunk_bytes: int, residuals: tuple[jax.Array, ...], cotangents: TokenScores
) -> tuple[jax.Array, jax.Array, None]:
    """With p the probabilities, H the entropy and δ the target: ∂ log p_δ / ∂x = δ - p, ∂H / ∂x = -p (log p + H)."""

    def of_a_device(
        hidden: jax.Array, table: jax.Array, targets: jax.Array, *per_token: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        states, wanted = _matrix(hidden), _row_of_table(targets, table)
        top, log_total, entropy, of_logprob, of_entropy = (x.reshape(-1, 1) for x in per_token)

        def add(carry: tuple[jax.Array, jax.Array], start: Any, part: jax.Array) -> tuple[jax.Array, jax.Array]:
            of_states, of_table = carry
            logits = _logits(states, part, temperature)
            log_p = logits - top - log_total
            p = jnp.exp(log_p)
            of_logits = of_logprob * (_is_entry(wanted - start, logits) - p) - of_entropy * p * (log_p + entropy)
            of_logits = (of_logits / temperature).astype(table.dtype)
            of_states += jnp.einsum("nc,cd->nd", of_logits, part, preferred_element_type=jnp.float32)
            of_part = jnp.einsum("nc,nd->cd", of_logits, states, preferred_element_type=jnp.float32)
            of_part = jax.lax.psum(_scattered(of_part), "data").astype(table.dtype)
            return of_states, jax.lax.dynamic_update_slice_in_dim(of_table, of_part, start, axis=0)

        zeros = jnp.zeros(states.shape, jnp.float32), jnp.zeros_like(table)
        of_states, of_table = _over_chunks(add, zeros, table, len(states), chunk_bytes)
        of_states = jax.lax.psum(of_states, "tensor")
        return of_states.astype(hidden.dtype).reshape(hidden.shape), of_table

    run = _on_mesh(of_a_device, mesh, (ROWS, TABLE, *[ROWS] * 6), (ROWS, TABLE))
    return *run(*residuals, cotangents.logprobs, cotangents.entropy), None


score_targets.defvjp(_forward, _backward)


def _on_mesh(of_a_device: Callable, mesh: Mesh, in_specs: tuple[P, ...], out_specs: Any) -> Callable:
    # Unchecked, because the loops' carries begin as constants, which are the same on all devices.
    return jax.shard_map(of_a_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _over_chunks(add: Callable, carry: Any, table: jax.Array, tokens: int, chunk_bytes: int) -> Any:
    """`carry` after add(carry, start, part) for every part table[start : start + C], whole along D.

    C is a multiple of 128, the width of a matrix unit; the last part may be smaller.
    """
    vocabulary = len(table)
    size = min(max(chunk_bytes // (4 * tokens) // 128, 1) * 128, vocabulary)
    before_last = (vocabulary - 1) // size

    def step(carry: Any, start: Any, size: int) -> Any:
        part = jax.lax.dynamic_slice_in_dim(table, start, size)
        return add(carry, start, _gathered(part))

    carry = jax.lax.fori_loop(0, before_last, lambda i, carry: step(carry, i * size, size), carry)
    return step(carry, before_last * size, vocabulary - before_last * size)


# Where "fsdp" has one device both do nothing.  XLA on a CPU would copy the table for them.


def _gathered(part: jax.Array) -> jax.Array:
    """Of all devices of "fsdp", along D."""
    return part if jax.lax.axis_size("fsdp") == 1 else jax.lax.all_gather(part, "fsdp", axis=1, tiled=True)


def _scattered(part: jax.Array) -> jax.Array:
    """The sum over all devices of "fsdp", of which each gets its part of D."""
    if jax.lax.axis_size("fsdp") == 1:
        return part
    return jax.lax.psum_scatter(part, "fsdp", scatter_dimension=1, tiled=True)


def _matrix(hidden: jax.Array) -> jax.Array:
    """[R, T, D] → [N, D]."""
    return hidden.reshape(-1, hidden.shape[-1])


def _row_of_table(targets: jax.Array, table: jax.Array) -> jax.Array:
    """The row of this device's `table` that holds each target, [N]; outside of it if another device has it."""
    return targets.reshape(-1) - jax.lax.axis_index("tensor") * len(table)


def _logits(states: jax.Array, part: jax.Array, temperature: float) -> jax.Array:
    """states [N, D], part [C, D] → float32 [N, C]."""
    return jnp.einsum("nd,cd->nc", states, part, preferred_element_type=jnp.float32) / temperature


def _is_entry(index: jax.Array, logits: jax.Array) -> jax.Array:
    """Whether entry [n, c] of `logits` is the one at index[n].  Unlike a gather, it needs no logits of other devices
    and joins the sum that reads them."""
    return jax.lax.broadcasted_iota(index.dtype, logits.shape, 1) == index[:, None]
