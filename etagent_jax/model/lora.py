"""Low-rank adapters (LoRA, arXiv 2106.09685): which products have one, and how they are merged into the kernels."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclass(frozen=True)
class Lora:
    """rank: of the products.  alpha: they are scaled by alpha / rank.  targets: the projections that get one."""

    rank: int
    alpha: float
    targets: tuple[Target, ...] = get_args(Target)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora: rank must be at least 1 and alpha above 0, got {self.rank} and {self.alpha}")
        unknown = [target for target in self.targets if target not in get_args(Target)]
        if unknown or not self.targets:
            raise ValueError(f"lora: targets must be some of {', '.join(get_args(Target))}, got {self.targets}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def merge(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Parameters without adapters: each kernel [L, in, out] plus scale · lora_in [L, in, r] · lora_out [L, r, out]
    (LoRA, section 4.1, eq. 3), in the kernel's dtype."""
    if "lora_in" not in params:
        return {name: merge(part, lora) if isinstance(part, dict) else part for name, part in params.items()}
    low = jnp.matmul(params["lora_in"], params["lora_out"], precision=jax.lax.Precision.HIGHEST)
    kernel = params["kernel"]
    merged = {name: part for name, part in params.items() if not name.startswith("lora_")}
    return merged | {"kernel": (kernel + lora.scale * low).astype(kernel.dtype)}
