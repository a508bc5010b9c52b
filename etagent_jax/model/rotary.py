"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the scaling of Llama 3."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the context: slow angles are divided by `factor`, fast ones are kept.

    A frequency that turns more than high_freq_factor times within original_max_position tokens is fast,
    one that turns less than low_freq_factor times is slow; between them the two are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope scaling: factor must be at least 1 and 0 < low_freq_factor < high_freq_factor, "
                             f"got {self.factor}, {self.low_freq_factor} and {self.high_freq_factor}")  # fmt: skip
        if self.original_max_position < 1:
            raise ValueError(f"rope scaling: original_max_position must be positive, got {self.original_max_position}")

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
        """float32 [H/2] → float32 [H/2], each operation as transformers rounds it."""
        wavelengths = np.float32(2 * np.pi) / frequencies
        turns = np.float32(self.original_max_position) / wavelengths
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        smooth = (turns - low) / np.float32(self.high_freq_factor - self.low_freq_factor)
        divided = frequencies / np.float32(self.factor)
        blended = (1 - smooth) * frequencies / np.float32(self.factor) + smooth * frequencies
        return np.select([turns < low, turns > high], [divided, frequencies], blended).astype(np.float32)


def frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """Radians per position of each pair of components: θ^(-2i/H), float32 [H/2].

    Every step is rounded as transformers rounds it: at position 100,000 an error in a frequency's last bit
    is one of 0.006 radians.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    return plain if scaling is None else scaling.apply(plain)


class Rotation(NamedTuple):
    """Sine and cosine of the rotary angles of every position, float32 [B, T, 1, H/2]."""

    sin: jax.Array
    cos: jax.Array


def rotation(positions: jax.Array, frequencies: np.ndarray) -> Rotation:
    """The angles at `positions` [B, T] for `frequencies` [H/2] (RoFormer, section 3.2.2)."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.sin(angles), jnp.cos(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotary position embedding of x [B, T, N, H] (RoFormer, eq. 34, halves as in Hugging Face)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
