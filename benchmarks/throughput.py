"""Tokens per second of a fine-tuning step and of the embedded engine, on random weights of a real shape.

    python -m benchmarks.throughput --shape qwen2.5-0.5b --dtype bfloat16 --rows 8 --length 2048

Prints one JSON object.  MFU is model FLOPs over the rate of a large matrix product measured in the
same run; model FLOPs are 6 per parameter and trained token, and 12 · layers · heads · head_dim · length
per token for attention (causal masking not deducted).  Every timed region ends in block_until_ready.
"""

import argparse
import asyncio
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from etagent_jax.data.packing import Batch
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner
from etagent_jax.model.transformer import ModelConfig, Transformer, count_parameters
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Sampling
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_layers": 3, "num_heads": 4,
             "num_kv_heads": 2, "head_dim": 32},
    "qwen2.5-0.5b": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_layers": 24,
                     "num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "qkv_bias": True, "qk_norm": False},
    "qwen2.5-1.5b": {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_layers": 28,
                     "num_heads": 12, "num_kv_heads": 2, "head_dim": 128, "qkv_bias": True, "qk_norm": False},
}  # fmt: skip


def matmul_rate(dtype: str, size: int) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: multiply(a, b))


def median_seconds(run, repeats: int = 10) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def train_step(config: ModelConfig, rows: int, length: int, micro_batches: int, remat: str, rate: float) -> dict:
    optimizer = OptimizerConfig(learning_rate=1e-5, total_steps=1000)
    learner = Learner(config, optimizer, micro_batches=micro_batches, remat=remat)
    state = learner.init_state(0)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    zeros = np.zeros((rows, length), np.float32)
    batch = Batch(tokens, positions, np.ones_like(tokens), positions > 0, zeros, zeros)

    def step():
        nonlocal state
        state, metrics = learner.sft_step(state, batch)
        return metrics["loss"]

    seconds = median_seconds(step, 5)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length
    flops = rows * length * (6 * count_parameters(config) + attention)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {"step_seconds": seconds, "tokens_per_second": rows * length / seconds, "mfu": flops / seconds / rate,
            "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
            "recompiled": learner.sft_step._cache_size() > 1}  # fmt: skip


def decode(config: ModelConfig, slots: int, prompt: int, new: int) -> dict:
    tokenizer = Tokenizer(make_tokenizer(World.make(0, 60)))
    engine = Engine(Transformer(config, nnx.Rngs(0)), tokenizer, slots=slots, context=prompt + new + 1, chunk=64)
    rng = np.random.default_rng(0)

    async def batch(seed: int) -> float:
        prompts = rng.integers(2, config.vocab_size, (slots, prompt)).tolist()
        start = time.perf_counter()
        await asyncio.gather(*(engine.generate(p, Sampling(1.0, new, seed=seed)) for p in prompts))
        return time.perf_counter() - start

    async def measure() -> list[float]:
        await batch(0)
        return [await batch(i) for i in (1, 2, 3)]

    seconds = statistics.median(asyncio.run(measure()))
    engine.close()
    return {"seconds": seconds, "new_tokens_per_second": slots * new / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    a = parser.parse_args()

    config = ModelConfig(**SHAPES[a.shape], dtype=a.dtype)
    device = jax.devices()[0]
    rate = matmul_rate(a.dtype, 8192 if device.platform == "gpu" else 1024)
    print(json.dumps({
        "device": device.device_kind, "jax": jax.__version__, "arguments": vars(a),
        "parameters": count_parameters(config), "matmul_tflops": rate / 1e12,
        "train_step": train_step(config, a.rows, a.length, a.micro_batches, a.remat, rate),
        "decode": decode(config, a.slots, a.prompt, a.new),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
