"""Which updates are applied: those whose gradient is finite, of a norm not far beyond its recent mean."""

import jax
import jax.numpy as jnp

WARM_UP = 5
"""Updates before the norm is bounded."""
RATE = 0.1
"""Share of a new norm in the running mean, once 1 / RATE have been applied."""
MAX_RISE = 2.0
"""A norm enters the mean as at most this many times the mean: one update raises that by at most a tenth."""


def within_bound(norm: jax.Array, mean: jax.Array, applied: jax.Array, factor: float) -> jax.Array:
    """Whether a gradient of this norm may be applied: bool [].

    norm: float32 [].  mean: of the norms so far, float32 [], as `running_mean` gives it.  applied: int32 [],
    updates so far.  factor: the most that norm / mean may be; 0 for no bound.  What is not finite is never within.
    """
    finite = jnp.isfinite(norm)
    if not factor:
        return finite
    bounded = (applied >= WARM_UP) & (mean > 0)
    return finite & (~bounded | (norm <= factor * mean))


def running_mean(norm: jax.Array, mean: jax.Array, applied: jax.Array) -> jax.Array:
    """The mean after an update of this norm, whether it was applied or not: float32 [].

    A plain mean until ten were applied, then exponential.  A norm counts as at most MAX_RISE times the mean, so a
    spike hardly moves the bound; one that has risen for good lifts it by a tenth at every update, until the norm
    is within it again.  What is not finite leaves the mean as it was.
    """
    counted = jnp.where(mean > 0, jnp.minimum(norm, MAX_RISE * mean), norm)
    weight = jnp.maximum(1 / (applied + 1), RATE)
    return jnp.where(jnp.isfinite(norm), mean + weight * (counted - mean), mean)
