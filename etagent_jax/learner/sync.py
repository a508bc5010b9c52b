"""New weights from the learner to the policy that generates."""

import jax
import jax.numpy as jnp
from flax import nnx

from etagent_jax.learner.step import Params
from etagent_jax.policy.engine import Engine


async def push_weights(params: Params, version: int, engine: Engine) -> None:
    """Serve `params` as `version` from now on: a copy of them, for the next step donates the originals."""
    await engine.update_weights(version, nnx.State(jax.tree.map(jnp.copy, params)))
