"""A learner: a model, an optimizer and a mesh, compiled into fine-tuning, policy and scoring steps.

Shapes: R rows, T tokens of a row.  Entry [r, t] of any array speaks of token t of row r.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from etagent_jax.data.packing import DTYPES, Batch
from etagent_jax.learner import guard, losses, mismatch, trainable
from etagent_jax.learner.lookup import ShardedLookup
from etagent_jax.learner.losses import Metrics, PolicyLossConfig
from etagent_jax.learner.mesh import (
    ROWS,
    check_heads,
    check_rows,
    logical_axes,
    make_mesh,
    parameter_shardings,
    state_shardings,
)
from etagent_jax.learner.optimizer import OptimizerConfig, learning_rate, make_optimizer
from etagent_jax.learner.scores import token_scores
from etagent_jax.model import weights
from etagent_jax.model.attention import AttentionKind, kind_of
from etagent_jax.model.attention import make as make_attention
from etagent_jax.model.folder import read_config
from etagent_jax.model.lora import Lora, merge
from etagent_jax.model.transformer import Execution, ModelConfig, Remat, Transformer

Params = dict[str, Any]
"""The parameters of a model: nested dicts of arrays; `nnx.merge` makes a model of graph and parameters."""

TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Gather a weight whole before its product, instead of a ring of products that each touch the whole result."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: int32 [], updates done.  skipped: int32 [], those of them that were not applied.
    opt_state: of the parameters that learn.
    gradient_norm: float32 [], the running mean that a gradient's norm is compared with (see guard.py).
    """

    step: jax.Array
    skipped: jax.Array
    params: Params
    opt_state: optax.OptState
    gradient_norm: jax.Array


class Learner:
    """The compiled steps of one model on one mesh.

    Rows are worked on in `micro_batches` equal parts; parts at the end that hold only padding are
    skipped, so that batches of different size share one compiled shape.  Rows must be a multiple of
    micro_batches × data × fsdp.

    Parameters are kept in float32, whatever the model computes in.  With `lora` only its adapters
    learn, and the rest is kept in the model's dtype.  `frozen`: regular expressions for the paths of
    parameters that do not learn (see trainable.py).  What does not learn has no gradient and no moments.

    A step takes its `state` for good: the buffers are donated, so a copy must be made of what is to
    live on.  Metrics are float32 scalars on the device, exact means over the tokens that bear loss.

    An update that is not finite, has a gradient far beyond its recent norm (see guard.py), or has no token that
    bears loss is not applied: parameters and optimizer, its schedule included, stay as they were, and the metric
    `skipped` is 1.  `check_finite` raises for the first kind.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        policy: PolicyLossConfig | None = None,
        mesh: Mesh | None = None,
        micro_batches: int = 1,
        remat: Remat = "none",
        attention: AttentionKind | Literal["auto"] = "auto",
        lora: Lora | None = None,
        frozen: tuple[str, ...] = (),
    ):
        if micro_batches < 1:
            raise ValueError(f"learner: micro_batches must be at least 1, got {micro_batches}")
        self.mesh = make_mesh() if mesh is None else mesh
        check_heads(model, self.mesh)
        self.policy = PolicyLossConfig() if policy is None else policy
        self.micro_batches = micro_batches
        self.lora = lora
        self.config = dataclasses.replace(model, param_dtype=model.dtype if lora else "float32")

        attend = make_attention(
            attention, self.mesh, dtype=model.dtype, head_dim=model.head_dim, num_kv_heads=model.num_kv_heads
        )
        self.remat, self._attend = remat, attend
        execution = Execution(remat, attend, ShardedLookup(self.mesh), HiddenSharding(self.mesh))
        create = lambda key: Transformer(self.config, nnx.Rngs(key), execution, lora)
        self.graph, abstract = nnx.split(nnx.eval_shape(create, jax.random.key(0)))
        params, axes = nnx.to_pure_dict(abstract), logical_axes(abstract)
        self.learns = trainable.learning_paths(params, lora is not None, frozen)
        self._optimizer = make_optimizer(optimizer, trainable.split(axes, self.learns)[0])
        self._schedule, self._skip_factor = learning_rate(optimizer), optimizer.skip_factor

        fresh_moments = lambda params: self._optimizer.init(trainable.split(params, self.learns)[0])
        zeros = lambda: {"step": jnp.int32(0), "skipped": jnp.int32(0), "gradient_norm": jnp.float32(0)}
        fresh = lambda params: TrainState(params=params, opt_state=fresh_moments(params), **zeros())
        abstract_state = jax.eval_shape(fresh, params)
        placed = parameter_shardings(params, axes, self.mesh)
        self.shardings: TrainState = state_shardings(abstract_state, placed, self.mesh)
        self.abstract_state: TrainState = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract_state,
            self.shardings,
        )
        initial = lambda key: nnx.to_pure_dict(nnx.state(create(key), nnx.Param))
        self._initial_params = jax.jit(initial, out_shardings=self.shardings.params)
        self._initial_opt_state = jax.jit(fresh_moments, out_shardings=self.shardings.opt_state)
        self._row_sharding, replicated = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        self._initial_counts = jax.jit(zeros, out_shardings=replicated)
        rows = self._row_sharding
        options = TPU_OPTIONS if self.mesh.devices.flat[0].platform == "tpu" else None
        jit_step = lambda step, *inputs: jax.jit(
            step, in_shardings=(self.shardings, *inputs), out_shardings=(self.shardings, replicated),
            donate_argnums=0, compiler_options=options,
        )  # fmt: skip
        self._jit_sft_step = jit_step(self._sft_step, rows)
        self._jit_policy_step = jit_step(self._policy_step, rows, rows, rows)
        self._jit_score = jax.jit(
            self._score, in_shardings=(self.shardings.params, rows), out_shardings=rows, compiler_options=options
        )
        self._jit_serving_params = jax.jit(self._serving_params)

    def sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update of supervised fine-tuning."""
        return self._jit_sft_step(state, self.rows(batch))

    def policy_step(
        self, state: TrainState, batch: Batch, old_logprobs: jax.Array, ref_logprobs: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        """One update of the policy; log-probabilities [R, T] as `score` gives them."""
        return self._jit_policy_step(state, self.rows(batch), old_logprobs, ref_logprobs)

    def score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy of every token at the policy's temperature, float32 [R, T]."""
        return self._jit_score(params, self.rows(batch))

    def rows(self, batch: Batch) -> Batch:
        """The batch on the mesh.  Every process holds it whole, and puts the rows of its own devices there."""
        check_rows(len(batch.tokens), self.micro_batches, self.mesh)
        put = lambda x: jax.make_array_from_callback(x.shape, self._row_sharding, lambda index: x[index])
        return jax.tree.map(put, batch)

    def lower_sft_step(self, rows: int, length: int) -> Lowered:
        """The fine-tuning step for rows of `length` tokens, from shapes alone, on devices that need not be there."""
        return self._jit_sft_step.lower(self.abstract_state, self._abstract_rows(rows, length))

    def lower_policy_step(self, rows: int, length: int) -> Lowered:
        """The policy step likewise, with a reference if its loss has a KL term."""
        batch = self._abstract_rows(rows, length)
        logprobs = batch.sampler_logprobs
        return self._jit_policy_step.lower(
            self.abstract_state, batch, logprobs, logprobs if self.policy.kl_coefficient else None
        )

    def init_state(self, seed: int) -> TrainState:
        """Fresh parameters, made where they lie; the same for every mesh."""
        return self._fresh(self._initial_params(jax.random.key(seed)))

    def load_state(self, folder: str | Path) -> TrainState:
        """The parameters of a Hugging Face model folder, with a fresh optimizer."""
        return self._fresh(self.load_params(folder))

    def load_params(self, folder: str | Path) -> Params:
        """The parameters of a Hugging Face model folder, read into their shards; adapters as they begin, at zero."""
        found = read_config(folder)
        if dataclasses.replace(found, param_dtype=self.config.param_dtype) != self.config:
            raise ValueError(f"{folder}: the learner is made for {self.config}, but the folder holds {found}")
        if self.lora is None:
            return weights.load_params(folder, self.config, self.shardings.params)
        adapters, _ = trainable.split(self._initial_params(jax.random.key(0)), self._adapters)
        _, shardings = trainable.split(self.shardings.params, self._adapters)
        return trainable.join(weights.load_params(folder, self.config, shardings), adapters)

    def whole_rows(self, rows: int) -> int:
        """The least number of rows, at least `rows`, that every micro-batch and device can share equally."""
        unit = self.micro_batches * self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-rows // unit) * unit

    def model(self, params: Params) -> Transformer:
        """The model of these parameters; it shares their buffers, so it dies with the next step."""
        return nnx.merge(self.graph, params)

    def serving_params(self, params: Params) -> Params:
        """What a policy is served with, and a folder written from: adapters merged, all in the model's dtype.

        Still sharded over the mesh; they may share buffers with `params`.
        """
        return self._jit_serving_params(params)

    def changing(self, state: TrainState) -> TrainState:
        """The state without the parameters that do not learn: what a checkpoint must hold."""
        return dataclasses.replace(state, params=trainable.split(state.params, self.learns)[0])

    def resumed(self, changing: TrainState, initial: TrainState) -> TrainState:
        """The state of a checkpoint, with those parameters again, from the state the run began with."""
        still = trainable.split(initial.params, self.learns)[1]
        return dataclasses.replace(changing, params=trainable.join(changing.params, still))

    @property
    def summary(self) -> str:
        """What is trained and how, in a line."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        return (
            f"{size:,} parameters, of which {self.learning_size:,} learn; computed in {self.config.dtype}, "
            f"attention {kind_of(self._attend)}, remat {self.remat}; "
            f"mesh {mesh}; {self.micro_batches} micro-batches"
        )

    @functools.cached_property
    def learning_size(self) -> int:
        """How many numbers learn."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.changing(self.abstract_state).params))

    @property
    def compilations(self) -> int:
        """How many programs the steps have been compiled into so far: one for each step and shape in use."""
        steps: tuple[Any, ...] = (self._jit_sft_step, self._jit_policy_step, self._jit_score)
        return sum(step._cache_size() for step in steps)

    @property
    def _adapters(self) -> trainable.Paths:
        return trainable.learning_paths(self.abstract_state.params, True, ())

    def _abstract_rows(self, rows: int, length: int) -> Batch:
        check_rows(rows, self.micro_batches, self.mesh)
        shape = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=self._row_sharding)
        return Batch(**{name: shape(dtype) for name, dtype in DTYPES.items()})  # type: ignore[arg-type]

    def _fresh(self, params: Params) -> TrainState:
        return TrainState(params=params, opt_state=self._initial_opt_state(params), **self._initial_counts())

    def _serving_params(self, params: Params) -> Params:
        merged = merge(params, self.lora) if self.lora is not None else params
        return jax.tree.map(lambda x: x.astype(self.config.dtype), merged)

    def _sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = token_count(batch)
        loss = lambda params, batch: losses.sft_loss(self.model(params), batch, tokens, self.mesh)
        return self._update(state, loss, batch, {"tokens": tokens})

    def _policy_step(
        self, state: TrainState, batch: Batch, old_logprobs: jax.Array, ref_logprobs: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        more = mismatch.sampler_gap(batch, old_logprobs, token_count(batch))
        more["sequences_rejected"] = jnp.float32(0)
        if self.policy.max_sequence_weight:
            agrees = mismatch.agrees(batch, old_logprobs, self.policy.max_sequence_weight)
            more["sequences_rejected"] = (mismatch.first_tokens(batch.segment_ids) & ~agrees).sum(dtype=jnp.float32)
            batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & agrees)
        tokens = token_count(batch)

        def loss(params: Params, inputs: tuple) -> tuple[jax.Array, Metrics]:
            batch, old, ref = inputs
            scores = token_scores(self.model(params), batch, self.policy.temperature, self.mesh)
            return losses.policy_loss(scores, batch, old, ref, tokens, self.policy)

        return self._update(state, loss, (batch, old_logprobs, ref_logprobs), {"tokens": tokens, **more})

    def _score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        micro_batches = self._split(batch)

        def one(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            inputs = jax.tree.map(lambda x: x[i], micro_batches)
            scores = token_scores(self.model(params), inputs, self.policy.temperature, self.mesh)
            return out[0].at[i].set(scores.logprobs), out[1].at[i].set(scores.entropy)

        zeros = jnp.zeros(micro_batches.tokens.shape, jnp.float32)
        scores = jax.lax.fori_loop(0, used_micro_batches(micro_batches), one, (zeros, zeros))
        return jax.tree.map(self._join, scores)

    def _split(self, rows: Any) -> Any:
        """Arrays [R, T] as micro-batches [M, R / M, T], the first rows first, so that padding comes last."""
        sharding = NamedSharding(self.mesh, P(None, *ROWS))
        split = lambda x: jax.lax.with_sharding_constraint(x.reshape(self.micro_batches, -1, x.shape[1]), sharding)
        return jax.tree.map(split, rows)

    def _join(self, x: jax.Array) -> jax.Array:
        """Micro-batches [M, R / M, T] as [R, T] again."""
        return x.reshape(-1, x.shape[-1])

    def _update(
        self,
        state: TrainState,
        loss: Callable[[Params, Any], tuple[jax.Array, Metrics]],
        inputs: Any,
        more: Metrics,
    ) -> tuple[TrainState, Metrics]:
        """One optimizer update with the gradients of `loss` summed over the micro-batches of `inputs`."""
        learning, still = trainable.split(state.params, self.learns)
        gradient = jax.grad(lambda learning, inputs: loss(trainable.join(learning, still), inputs), has_aux=True)
        shardings, _ = trainable.split(self.shardings.params, self.learns)

        micro_batches = self._split(inputs)

        def add(i: jax.Array, total: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
            micro_batch = jax.tree.map(lambda x: x[i], micro_batches)
            gradients, metrics = jax.tree.map(jnp.add, total, gradient(learning, micro_batch))
            return jax.lax.with_sharding_constraint(gradients, shardings), metrics

        shapes = jax.eval_shape(gradient, learning, jax.tree.map(lambda x: x[0], micro_batches))
        gradients, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = jax.lax.with_sharding_constraint(gradients, shardings), metrics
        gradients, metrics = jax.lax.fori_loop(0, used_micro_batches(micro_batches), add, zeros)

        grad_norm = optax.global_norm(gradients)
        sound = jnp.isfinite(metrics["loss"]) & batch_of(micro_batches).loss_mask.any()
        norm, applied = jnp.where(sound, grad_norm, jnp.nan), state.step - state.skipped
        applies = guard.within_bound(norm, state.gradient_norm, applied, self._skip_factor)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, learning)
        keep = lambda new, old: jnp.where(applies, new, old)
        learned = jax.tree.map(keep, optax.apply_updates(learning, updates), learning)
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~applies,
            params=trainable.join(learned, still),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            gradient_norm=guard.running_mean(norm, state.gradient_norm, applied),
        )
        more = {**more, "grad_norm": grad_norm, "learning_rate": self._schedule(applied)}
        return new, {**metrics, **more, "skipped": (~applies).astype(jnp.float32)}


@dataclass(frozen=True)
class HiddenSharding:
    """Pins hidden states [B·T, D]: rows over data and fsdp, whole along D."""

    mesh: Mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*ROWS, None)))


def batch_of(inputs: Any) -> Batch:
    """The batch itself, of a loss's inputs: a Batch, or a tuple that starts with one."""
    return inputs if isinstance(inputs, Batch) else inputs[0]


def used_micro_batches(micro_batches: Any) -> jax.Array:
    """How many leading micro-batches hold a token: int32 [].  The rest is padding, and costs nothing.

    micro_batches: of arrays [M, r, T], as `batch_of` takes them.
    """
    holds_tokens = (batch_of(micro_batches).segment_ids > 0).any(axis=(1, 2))
    return jnp.max(jnp.where(holds_tokens, jnp.arange(1, len(holds_tokens) + 1), 0))


def token_count(batch: Batch) -> jax.Array:
    """Tokens of the batch that bear loss, float32 []; at least 1, so that a batch without any is no NaN."""
    return jnp.maximum(batch.loss_mask.sum(), 1).astype(jnp.float32)


def check_finite(metrics: Mapping[str, Any], step: int) -> None:
    """FloatingPointError if the update of this step was not finite; it was then not applied."""
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the update was not applied. "
            "Lower the learning rate, or look for bad values in the batch of this step"
        )
