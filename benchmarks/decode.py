"""The embedded engine on the device at hand: new tokens per second at a full house of slots.

python -m benchmarks.decode [--shape=qwen2.5-0.5b --slots=64 --prompt=256 --new=256]
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from flax import nnx

from benchmarks.train_step import TINY
from etagent_jax.model.shapes import SHAPES
from etagent_jax.model.transformer import ModelConfig, Transformer
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Sampling
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer


def decode(config: ModelConfig, slots: int, prompt: int, new: int) -> float:
    """Median seconds for `slots` prompts of as many random tokens, each continued by `new`."""
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
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    a = parser.parse_args()
    config = TINY if a.shape == "tiny" else SHAPES[a.shape]
    config = dataclasses.replace(config, param_dtype=config.dtype)
    seconds = decode(config, a.slots, a.prompt, a.new)
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "arguments": vars(a), "seconds": seconds,
        "new_tokens_per_second": a.slots * a.new / seconds,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
