"""New weights from the learner to the policy that generates."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from etagent_jax.learner.step import Learner, Params
from etagent_jax.policy.engine import Engine


async def push_weights(learner: Learner, params: Params, version: int, engine: Engine) -> None:
    """Serve `params` as `version` from now on, in the engine of every process: a copy of them, for the next step
    donates the originals.  All processes call it."""
    device = jax.local_devices()[0]
    replicate = _replicate(learner.mesh)

    def here(x: jax.Array) -> jax.Array:  # one array after the other, so that no device holds them all but this one
        return next(shard.data for shard in replicate(x).addressable_shards if shard.device == device)

    await engine.update_weights(version, nnx.State(jax.tree.map(here, learner.serving_params(params))))


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A compiled copy of an array, whole on every device."""
    return jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, P()))
