"""Memory of cross-entropy from chunks of the vocabulary, and from logits that are all there at once.

    python -m benchmarks.cross_entropy
    python -m benchmarks.cross_entropy --run --json

Compiles value and gradient, in hidden states and table, of the fine-tuning and of the policy loss (with
entropy) for the device at hand, and prints the bytes of temporaries; nothing of that size is executed.
With --run both are executed at a small size and compared, and, on an accelerator, timed at full size.
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import seconds_of
from etagent_jax.data.packing import Batch
from etagent_jax.learner.losses import PolicyLossConfig, masked_mean, policy_loss
from etagent_jax.learner.mesh import make_mesh
from etagent_jax.learner.scores import TokenScores, score_targets

Score = Callable[[jax.Array, jax.Array, jax.Array], TokenScores]
Loss = Callable[[TokenScores, Batch], jax.Array]
POLICY = PolicyLossConfig(entropy_coefficient=0.01)


def naive(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> TokenScores:
    """What `score_targets` computes, from a float32 array of all logits and its derivatives."""
    logits = (hidden @ table.T).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return TokenScores(logprobs, -(jnp.exp(log_p) * log_p).sum(axis=-1), logprobs >= log_p.max(axis=-1))


def chunked(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> TokenScores:
    return score_targets(hidden, table, targets, 1.0, make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def fine_tuning(scores: TokenScores, batch: Batch) -> jax.Array:
    return masked_mean(-scores.logprobs, batch.loss_mask, jnp.float32(batch.tokens.size))


def policy(scores: TokenScores, batch: Batch) -> jax.Array:
    return policy_loss(scores, batch, batch.sampler_logprobs, None, jnp.float32(batch.tokens.size), POLICY)[0]


LOSSES = {"fine-tuning": fine_tuning, "policy with entropy": policy}


def value_and_gradients(score: Score, loss: Loss) -> jax.stages.Wrapped:
    """A function of hidden [R, T, D], table [V, D] and a batch whose tokens [R, T] are the targets."""
    of_scores = lambda hidden, table, batch: loss(score(hidden, table, batch.tokens), batch)
    return jax.jit(jax.value_and_grad(of_scores, argnums=(0, 1)))


def random_arguments(
    rows: int, length: int, vocabulary: int, hidden: int, dtype: str
) -> tuple[jax.Array, jax.Array, Batch]:
    """Arguments of such a function."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, dtype)
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, vocabulary)
    advantages = normal(3, rows, length).astype(jnp.float32)
    logprobs = jnp.full((rows, length), -np.log(vocabulary), jnp.float32)
    batch = Batch(tokens, tokens, tokens, jnp.ones((rows, length), bool), advantages, logprobs)
    return normal(0, rows, length, hidden), 0.02 * normal(1, vocabulary, hidden), batch


def temporaries(score: Score, loss: Loss, *sizes) -> int:
    """Bytes that value and gradients need beside arguments and results; `sizes` as of `random_arguments`."""
    shapes = jax.eval_shape(lambda: random_arguments(*sizes))
    return value_and_gradients(score, loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def difference(loss: Loss, *sizes) -> dict[str, float]:
    """Of both ways, executed: of their losses, and of their gradients relative to the largest entry."""
    arguments = random_arguments(*sizes)
    (one, gradients), (other, others) = (value_and_gradients(score, loss)(*arguments) for score in (naive, chunked))
    relative = [
        float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(a).max())
        for a, b in zip(gradients, others, strict=True)
    ]
    return {"loss": float(jnp.abs(one - other)), "hidden gradient": relative[0], "table gradient": relative[1]}


def seconds(score: Score, loss: Loss, *sizes) -> float:
    function, arguments = value_and_gradients(score, loss), random_arguments(*sizes)
    return seconds_of(lambda: function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--run", action="store_true", help="execute, compare and (on an accelerator) time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    a = parser.parse_args()
    sizes = (a.rows, a.length, a.vocabulary, a.hidden, a.dtype)
    device = jax.devices()[0]
    report: dict = {"device": device.device_kind, "jax": jax.__version__, "sizes": sizes}

    for name, loss in LOSSES.items():
        before, after = temporaries(naive, loss, *sizes), temporaries(chunked, loss, *sizes)
        report[name] = {"naive_bytes": before, "chunked_bytes": after, "ratio": before / after}
        if a.run:
            report[name]["difference"] = difference(loss, 2, 256, 4096, 64, a.dtype)
        if a.run and device.platform != "cpu":
            report[name]["seconds"] = {s.__name__: seconds(s, loss, *sizes) for s in (naive, chunked)}

    if a.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{device.device_kind}, jax {jax.__version__}, B {a.rows}, T {a.length}, V {a.vocabulary}, D {a.hidden}, "
          f"{a.dtype}\n")  # fmt: skip
    print("| loss | naive MiB | chunked MiB | naive / chunked |\n| --- | --- | --- | --- |")
    for name in LOSSES:
        r = report[name]
        print(f"| {name} | {r['naive_bytes'] / 2**20:.0f} | {r['chunked_bytes'] / 2**20:.0f} | {r['ratio']:.1f} |")
    for name in LOSSES:
        for kind in ("difference", "seconds"):
            if kind in report[name]:
                print(f"{name}, {kind}: " + ", ".join(f"{k} {v:.2g}" for k, v in report[name][kind].items()))


if __name__ == "__main__":
    main()
