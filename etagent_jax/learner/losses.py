"""What is minimised: cross-entropy for fine-tuning, the clipped policy objective for calibration.

Every loss and metric is a sum over the tokens of one micro-batch divided by `token_count`, the number
of tokens that bear loss in the *whole* batch: summed over micro-batches they are exact global means.

Shapes: R rows, T tokens of a row.  Entry [r, t] speaks of token t, predicted from t-1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from etagent_jax.data.packing import Batch
from etagent_jax.learner.scores import TokenScores, token_scores
from etagent_jax.model.transformer import Transformer

Metrics = dict[str, jax.Array]

MAX_LOG_RATIO = 20.0


def masked_mean(values: jax.Array, mask: jax.Array, token_count: jax.Array) -> jax.Array:
    """Sum of `values` where `mask`, over `token_count`; what stands elsewhere never matters."""
    return jnp.where(mask, values, 0).sum() / token_count


def sft_loss(
    model: Transformer, batch: Batch, token_count: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, Metrics]:
    """Token-mean cross-entropy over the tokens that bear loss; `mesh` as in `token_scores`."""
    scores = token_scores(model, batch, mesh=mesh)
    loss = masked_mean(-scores.logprobs, batch.loss_mask, token_count)
    return loss, {"loss": loss, "accuracy": masked_mean(scores.most_likely, batch.loss_mask, token_count)}


@dataclass(frozen=True)
class PolicyLossConfig:
    """temperature: of the sampler.  clip_low, clip_high: the ratio stays in [1 - low, 1 + high].

    dual_clip: with a negative advantage the objective is at least dual_clip · advantage.
    max_weight: truncation of the importance weight between sampler and learner.
    max_sequence_weight: a sequence whose geometric-mean importance weight lies outside [1 / this, this]
    bears no loss (see `mismatch.agrees`); 0 lets every sequence bear loss.
    kl_coefficient: of the KL divergence from the reference; needs reference log-probabilities.
    """

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    max_weight: float = 2.0
    max_sequence_weight: float = 0.0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"policy loss: temperature must be above 0, got {self.temperature}")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"policy loss: clip_low must be in (0, 1) and clip_high above 0, "
                             f"got {self.clip_low} and {self.clip_high}")  # fmt: skip
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"policy loss: dual_clip must exceed 1 + clip_high = {1 + self.clip_high}, "
                             f"got {self.dual_clip}")  # fmt: skip
        if self.max_weight < 1:
            raise ValueError(f"policy loss: max_weight must be at least 1, got {self.max_weight}")
        if self.max_sequence_weight and self.max_sequence_weight <= 1:
            raise ValueError(f"policy loss: max_sequence_weight must be above 1, or 0 to reject no sequence, "
                             f"got {self.max_sequence_weight}")  # fmt: skip


def policy_loss(
    scores: TokenScores,
    batch: Batch,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array | None,
    token_count: jax.Array,
    config: PolicyLossConfig,
) -> tuple[jax.Array, Metrics]:
    """The token-mean clipped policy objective of GRPO, negated.

    With log-probabilities ℓ under the current weights, ℓ_old under those before the update, ℓ_s from
    the sampler (all at the sampling temperature, [R, T]) and ratio r = exp(ℓ - ℓ_old), a token's
    objective is min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, eq. 7; separate bounds
    as in DAPO, arXiv 2503.14476), at least c A where A < 0 (dual clip, arXiv 1912.09729), times the constant
    min(exp(ℓ_old - ℓ_s), C) (truncated importance sampling between engines).  To its negative are
    added kl_coefficient · (exp(ℓ_ref - ℓ) - (ℓ_ref - ℓ) - 1) (k3: GRPO, arXiv 2402.03300, eq. 4)
    and -entropy_coefficient · entropy.

    Metrics: loss, policy_loss, ratio, clip_fraction (tokens whose gradient a bound cut off),
    approximate_kl (k3 of the old policy from the new), entropy, and kl where there is a reference.
    """
    mask, advantages = batch.loss_mask, batch.advantages
    mean = lambda values: masked_mean(values, mask, token_count)
    log_ratio = jnp.clip(jnp.where(mask, scores.logprobs - old_logprobs, 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    weight = jnp.minimum(jnp.exp(jnp.where(mask, old_logprobs - batch.sampler_logprobs, 0)), config.max_weight)

    free = ratio * advantages
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantages
    bound = jnp.where(advantages < 0, config.dual_clip * advantages, -jnp.inf)
    objective = jnp.maximum(jnp.minimum(free, clipped), bound)
    surrogate = mean(-objective * jax.lax.stop_gradient(weight))
    metrics = {
        "policy_loss": surrogate,
        "ratio": mean(ratio),
        "clip_fraction": mean((clipped < free) | (bound > free)),
        "approximate_kl": mean(ratio - 1 - log_ratio),
        "entropy": mean(scores.entropy),
    }
    loss = surrogate
    if ref_logprobs is not None:
        ref_log_ratio = jnp.clip(jnp.where(mask, ref_logprobs - scores.logprobs, 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        metrics["kl"] = mean(jnp.exp(ref_log_ratio) - ref_log_ratio - 1)
        loss += config.kl_coefficient * metrics["kl"]
    if config.entropy_coefficient:
        loss -= config.entropy_coefficient * metrics["entropy"]
    return loss, {"loss": loss, **metrics}
