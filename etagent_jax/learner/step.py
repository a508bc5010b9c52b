"""A learner: a model, an optimizer and a mesh, compiled into fine-tuning, policy and scoring steps.

Shapes: R rows, T tokens of a row.  Entry [r, t] of any array speaks of token t of row r.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from etagent_jax.data.packing import Batch
from etagent_jax.learner import losses
from etagent_jax.learner.losses import Metrics, PolicyLossConfig
from etagent_jax.learner.mesh import ROWS, check_rows, logical_axes, make_mesh, parameter_shardings, state_shardings
from etagent_jax.learner.optimizer import OptimizerConfig, learning_rate, make_optimizer
from etagent_jax.model.transformer import ModelConfig, Remat, Transformer

Params = Any
"""The parameters of a model: nested dicts of arrays; `nnx.merge` makes a model of graph and parameters."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.  step: int32 [], updates done."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


class Learner:
    """The jitted steps of one model on one mesh.

    sft_step(state, batch) -> (state, metrics)
    policy_step(state, batch, old_logprobs, ref_logprobs or None) -> (state, metrics), all by position
    score(params, batch) -> (logprobs, entropy), float32 [R, T], at the policy's temperature

    Rows are worked on in `micro_batches` equal parts; parts at the end that hold only padding are
    skipped, so that batches of different size share one compiled shape.

    A step takes its `state` for good: the buffers are donated, so a copy must be made of what is to
    live on.  Rows must be a multiple of micro_batches × data × fsdp.  Metrics are float32 scalars on
    the device, exact means over the tokens that bear loss.  An update that is not finite leaves
    parameters and optimizer as they were; `check_finite` raises.
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
    ):
        if micro_batches < 1:
            raise ValueError(f"learner: micro_batches must be at least 1, got {micro_batches}")
        self.mesh = make_mesh() if mesh is None else mesh
        self.policy = PolicyLossConfig() if policy is None else policy
        self.micro_batches = micro_batches
        self.config = model
        create = lambda key: Transformer(model, nnx.Rngs(key), remat)
        self.graph, abstract = nnx.split(nnx.eval_shape(create, jax.random.key(0)))
        params, axes = nnx.to_pure_dict(abstract), logical_axes(abstract)
        self._optimizer = make_optimizer(optimizer, axes)
        self._schedule = learning_rate(optimizer)

        fresh = lambda params: TrainState(jnp.int32(0), params, self._optimizer.init(params))
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
        self._initial_opt_state = jax.jit(self._optimizer.init, out_shardings=self.shardings.opt_state)
        rows, replicated = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        jit_step = lambda step, *inputs: jax.jit(
            step, in_shardings=(self.shardings, *inputs), out_shardings=(self.shardings, replicated), donate_argnums=0
        )
        self.sft_step = jit_step(self._sft_step, rows)
        self.policy_step = jit_step(self._policy_step, rows, rows, rows)
        self.score = jax.jit(self._score, in_shardings=(self.shardings.params, rows), out_shardings=rows)

    def init_state(self, seed: int) -> TrainState:
        """Fresh parameters, made where they lie; the same for every mesh."""
        return self._fresh(self._initial_params(jax.random.key(seed)))

    def load_state(self, model: Transformer) -> TrainState:
        """A copy of the parameters of `model`, with a fresh optimizer."""
        if model.config != self.config:
            raise ValueError(f"the learner is made for {self.config}, but the model is {model.config}")
        return self._fresh(self.place(model))

    def place(self, model: Transformer) -> Params:
        """A copy of the parameters of `model`, where this learner keeps them."""
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return jax.device_put(params, self.shardings.params, may_alias=False)

    def whole_rows(self, rows: int) -> int:
        """The least number of rows, at least `rows`, that every micro-batch and device can share equally."""
        unit = self.micro_batches * self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-rows // unit) * unit

    def model(self, params: Params) -> Transformer:
        """The model of these parameters; it shares their buffers, so it dies with the next step."""
        return nnx.merge(self.graph, params)

    def _fresh(self, params: Params) -> TrainState:
        step = jax.device_put(np.int32(0), self.shardings.step)
        return TrainState(step, params, self._initial_opt_state(params))

    def _sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = token_count(batch)
        loss = lambda params, batch: losses.sft_loss(self.model(params), batch, tokens)
        return self._update(state, loss, batch, {"tokens": tokens})

    def _policy_step(
        self, state: TrainState, batch: Batch, old_logprobs: jax.Array, ref_logprobs: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        tokens = token_count(batch)

        def loss(params: Params, inputs: tuple) -> tuple[jax.Array, Metrics]:
            batch, old, ref = inputs
            scores = losses.token_scores(self.model(params), batch, self.policy.temperature)
            return losses.policy_loss(scores, batch, old, ref, tokens, self.policy)

        more = {"tokens": tokens, **losses.sampler_gap(batch, old_logprobs, tokens)}
        return self._update(state, loss, (batch, old_logprobs, ref_logprobs), more)

    def _score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        micro_batches = self._split(batch)

        def one(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            inputs = jax.tree.map(lambda x: x[i], micro_batches)
            scores = losses.token_scores(self.model(params), inputs, self.policy.temperature)
            return out[0].at[i].set(scores.logprobs), out[1].at[i].set(scores.entropy)

        zeros = jnp.zeros(micro_batches.tokens.shape, jnp.float32)
        scores = jax.lax.fori_loop(0, used_micro_batches(micro_batches), one, (zeros, zeros))
        return jax.tree.map(self._join, scores)

    def _split(self, rows: Any) -> Any:
        """Arrays [R, T] as micro-batches [M, R / M, T], no row leaving its device."""
        sharding = NamedSharding(self.mesh, P(None, *ROWS))
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]

        def split(x: jax.Array) -> jax.Array:
            check_rows(x.shape[0], self.micro_batches, self.mesh)
            by_device = x.reshape(devices, self.micro_batches, -1, x.shape[1])
            micro_batches = by_device.swapaxes(0, 1).reshape(self.micro_batches, -1, x.shape[1])
            return jax.lax.with_sharding_constraint(micro_batches, sharding)

        return jax.tree.map(split, rows)

    def _join(self, x: jax.Array) -> jax.Array:
        """Micro-batches [M, R / M, T] as [R, T] again."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return x.reshape(self.micro_batches, devices, -1, x.shape[-1]).swapaxes(0, 1).reshape(-1, x.shape[-1])

    def _update(
        self,
        state: TrainState,
        loss: Callable[[Params, Any], tuple[jax.Array, Metrics]],
        inputs: Any,
        more: Metrics,
    ) -> tuple[TrainState, Metrics]:
        """One optimizer update with the gradients of `loss` summed over the micro-batches of `inputs`."""
        gradient = jax.grad(loss, has_aux=True)

        micro_batches = self._split(inputs)

        def add(i: jax.Array, total: Any) -> Any:
            micro_batch = jax.tree.map(lambda x: x[i], micro_batches)
            return jax.tree.map(jnp.add, total, gradient(state.params, micro_batch))

        shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], micro_batches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        gradients, metrics = jax.lax.fori_loop(0, used_micro_batches(micro_batches), add, zeros)

        grad_norm = optax.global_norm(gradients)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        keep = lambda new, old: jnp.where(finite, new, old)
        new = TrainState(
            state.step + 1,
            jax.tree.map(keep, optax.apply_updates(state.params, updates), state.params),
            jax.tree.map(keep, opt_state, state.opt_state),
        )
        return new, {**metrics, **more, "grad_norm": grad_norm, "learning_rate": self._schedule(state.step)}


def used_micro_batches(micro_batches: Any) -> jax.Array:
    """How many leading micro-batches hold a token: int32 [].  The rest is padding, and costs nothing.

    micro_batches: a Batch of arrays [M, r, T], or a tuple that starts with one.
    """
    batch = micro_batches if isinstance(micro_batches, Batch) else micro_batches[0]
    holds_tokens = (batch.segment_ids > 0).any(axis=(1, 2))
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
