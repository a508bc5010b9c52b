"""The fine-tuning and the policy step on the devices at hand: tokens per second, MFU, memory.

    python -m benchmarks.train_step                                          # the tiny model
    python -m benchmarks.train_step --shape=qwen2.5-0.5b --rows=8 --length=2048 --micro-batches=4 \\
        --remat none dots full --attention xla pallas --json

Random weights, rows full of tokens.  Prints a line for each attention and remat policy: the median
of five steps of each kind, model FLOP/s (causal attention counted half, nothing that remat repeats:
learner/throughput.py) against those of a large matrix product measured here in the same dtype, and
the memory that XLA planned for the step beside its arguments.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from etagent_jax.data.packing import Batch
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.learner.throughput import memory_gib, throughput
from etagent_jax.model.shapes import SHAPES
from etagent_jax.model.transformer import ModelConfig, count_parameters

TINY = ModelConfig(
    vocab_size=448, hidden_size=128, intermediate_size=384, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32
)


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `run`, after one run that compiles."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def product_tflops(dtype: str, size: int) -> float:
    """10¹² FLOP/s of a square matrix product of random numbers on one device."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_of(lambda: multiply(a, b)) / 1e12


def full_rows(rows: int, length: int, vocab_size: int) -> Batch:
    tokens = np.random.default_rng(0).integers(2, vocab_size, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones, zeros = np.ones((rows, length), np.float32), np.zeros((rows, length), np.float32)
    return Batch(tokens, positions, np.ones_like(tokens), positions > 0, ones, zeros)


def measure(config: ModelConfig, a: argparse.Namespace, attention: str, remat: str, ceiling: float) -> dict:
    learner = Learner(
        config, OptimizerConfig(learning_rate=1e-6, total_steps=1000), micro_batches=a.micro_batches, remat=remat,
        attention=attention,
    )  # fmt: skip
    batch = full_rows(a.rows, a.length, config.vocab_size)
    state = learner.init_state(0)
    old = learner.score(state.params, batch)[0]
    result: dict = {"attention": attention, "remat": remat}

    def sft() -> object:
        nonlocal state
        state, metrics = learner.sft_step(state, batch)
        return metrics

    def policy() -> object:
        nonlocal state
        state, metrics = learner.policy_step(state, batch, old, None)
        return metrics

    for name, step, lower in (
        ("sft", sft, learner.lower_sft_step),
        ("policy", policy, learner.lower_policy_step),
    ):
        speed = throughput(learner, batch, seconds_of(step))
        result[name] = {
            "tokens_per_second": speed["tokens_per_second"],
            "of_product": speed["tflops_per_device"] / ceiling,
            "temporaries_gib": lower(a.rows, a.length).compile().memory_analysis().temp_size_in_bytes / 2**30,
        }
    return result | {"peak_gib": memory_gib(), "compilations": learner.compilations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 if tiny, else bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--remat", nargs="+", choices=["none", "dots", "full"], default=["none"])
    parser.add_argument("--attention", nargs="+", default=["auto"], help="auto, xla, cudnn, pallas, splash")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    a = parser.parse_args()

    config = TINY if a.shape == "tiny" else SHAPES[a.shape]
    dtype = a.dtype or config.dtype
    config = dataclasses.replace(config, dtype=dtype)
    device = jax.devices()[0]
    ceiling = product_tflops(dtype, 1024 if device.platform == "cpu" else 8192)
    results = []
    for attention, remat in itertools.product(a.attention, a.remat):
        results.append(measure(config, a, attention, remat, ceiling))
        if not a.json:
            print(line(results[-1]), flush=True)
    about = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__, "dtype": dtype,
             "parameters": count_parameters(config), "product_tflops": ceiling, "arguments": vars(a)}  # fmt: skip
    print(json.dumps(about | {"results": results}, indent=1) if a.json else about)


def line(result: dict) -> str:
    steps = "   ".join(
        f"{name}: {r['tokens_per_second']:,.0f} tokens/s, {r['of_product']:.1%} of the product's FLOP/s, "
        f"{r['temporaries_gib']:.2f} GiB temporaries"
        for name, r in result.items()
        if isinstance(r, dict)
    )
    return f"{result['attention']}/{result['remat']}   {steps}   peak {result['peak_gib']:.2f} GiB"


if __name__ == "__main__":
    main()
