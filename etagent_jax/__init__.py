"""etagent_jax: train agents that use tools well, in JAX."""

__version__ = "0.1.0"
