"""The optimizer: AdamW, or Muon on the layers' matrices, under one learning-rate schedule."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


@dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: the peak, reached after warmup_steps; the cosine ends at total_steps with
    end_fraction of it.  muon_scale: Muon's learning rate as a multiple of AdamW's.
    momentum_dtype: of the first moment; bfloat16 saves two bytes a parameter.  The second moment stays
    float32: with b2 0.999 its steps are smaller than bfloat16 can hold.
    skip_factor: an update whose gradient norm exceeds this many times the recent mean is not applied (see
    guard.py); 0 applies whatever is finite."""

    learning_rate: float
    total_steps: int
    name: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    end_fraction: float = 0.1
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    muon_scale: float = 7.0
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    skip_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer: name must be adamw or muon, got {self.name!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer: schedule must be constant or cosine, got {self.schedule!r}")
        if self.momentum_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"optimizer: momentum_dtype must be float32 or bfloat16, got {self.momentum_dtype!r}")
        for field in ("learning_rate", "total_steps", "clip_norm", "muon_scale"):
            if getattr(self, field) <= 0:
                raise ValueError(f"optimizer: {field} must be above 0, got {getattr(self, field)}")
        if self.skip_factor and self.skip_factor <= 1:
            raise ValueError(f"optimizer: skip_factor must be above 1, or 0 to skip only what is not finite, "
                             f"got {self.skip_factor}")  # fmt: skip
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"optimizer: warmup_steps must be in [0, total_steps = {self.total_steps}), "
                             f"got {self.warmup_steps}")  # fmt: skip


def learning_rate(config: OptimizerConfig, scale: float = 1.0) -> optax.Schedule:
    """Step (from 0) to learning rate; the first step already moves."""
    peak = config.learning_rate * scale
    first = peak / max(config.warmup_steps, 1)
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(first, peak, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        first, peak, config.warmup_steps, config.total_steps, peak * config.end_fraction
    )


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """The transformation for parameters with these logical axes (see `mesh.logical_axes`).

    Gradients are clipped by their global norm.  Only the layers' matrices decay.  With Muon each of
    them is orthogonalised by itself; embedding, head, norms and biases get AdamW with Nesterov
    momentum.
    """
    matrices = jax.tree.map(lambda names: len(names) == 3 and names[0] == "layers", axes)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adamw":
        rate = learning_rate(config)
        adamw = optax.adamw(
            rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=matrices, mu_dtype=config.momentum_dtype
        )
        return optax.chain(clip, adamw)
    stacked = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return optax.chain(
        clip,
        muon(
            learning_rate(config, config.muon_scale),
            weight_decay=config.weight_decay,
            mu_dtype=config.momentum_dtype,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=learning_rate(config),
            muon_weight_dimension_numbers=jax.tree.map(lambda matrix: stacked if matrix else None, matrices),
        ),
    )
