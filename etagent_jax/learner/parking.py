"""The optimizer state in host memory while the learner's devices serve."""

import dataclasses
from typing import Any

import jax

from etagent_jax.learner.step import Learner, TrainState

HOST = "pinned_host"


def park(state: TrainState, learner: Learner) -> TrainState:
    """`state` with its optimizer state in the memory of each device's host, sharded as before.

    The arrays on the devices are freed, one after the other; `state` must not be used again.  Parameters stay where
    they are.  A step needs what `unpark` gives back.  On a CPU both kinds of memory are the same: the copies are
    made, but nothing is gained.
    """
    places = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), learner.shardings.opt_state)
    return dataclasses.replace(state, opt_state=jax.tree.map(_move, state.opt_state, places))


def unpark(state: TrainState, learner: Learner) -> TrainState:
    """What `park` has moved, bit for bit on the devices again; the arrays on the host are freed."""
    return dataclasses.replace(state, opt_state=jax.tree.map(_move, state.opt_state, learner.shardings.opt_state))


def _move(x: jax.Array, place: Any) -> jax.Array:
    moved = jax.block_until_ready(jax.device_put(x, place))
    x.delete()
    return moved
