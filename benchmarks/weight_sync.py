"""New weights from device arrays to "served by all servers": bytes per second, against plain writing on the same disk.

    python -m benchmarks.weight_sync                             # embedded server, the tiny model
    python -m benchmarks.weight_sync --shape=qwen2.5-0.5b --model=/data/random-0.5b
    python -m benchmarks.weight_sync --model=/data/random-0.5b --url http://127.0.0.1:30000

Pushes the model in the folder --model, which is made with random weights of --shape if it is not there, as the
learner does after an update.  The servers at --url must serve that model (start them with the folder as their
model); without --url an embedded server is started.  In turn, --repeats times and once more to warm up: as many
bytes written plainly to the same disk and forced onto it (write + fsync), all tensors gathered to the host and
dropped, a push.  Prints the medians and the growth of this process's peak memory during the pushes (on Linux).
On a GPU the embedded server shares it with the learner: set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.train_step import TINY
from etagent_jax.learner.optimizer import OptimizerConfig
from etagent_jax.learner.step import Learner, Params
from etagent_jax.learner.sync import Publication, serve_folder
from etagent_jax.model import weights
from etagent_jax.model.folder import read_config
from etagent_jax.model.shapes import SHAPES
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.sglang import SGLangPolicy
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer

BLOCK = np.random.default_rng(0).integers(0, 256, 64 * 2**20, np.uint8)


def make_model(config: ModelConfig, folder: Path) -> None:
    """A model folder with random weights."""
    tokenizer = Tokenizer(make_tokenizer(World.make(0)))
    learner = make_learner(config)
    weights.save(learner.init_state(0).params, config, folder, tokenizer.eos_ids, tokenizer.pad_id)
    tokenizer.save(folder)


def make_learner(config: ModelConfig) -> Learner:
    return Learner(config, OptimizerConfig(learning_rate=1e-6, total_steps=1))


@contextlib.contextmanager
def embedded_server(model: Path) -> Iterator[str]:
    """The URL of a server of its own process."""
    command = [sys.executable, "-m", "etagent_jax.serve", "--model", str(model), "--port=0", "--slots=2"]
    with subprocess.Popen([*command, "--context=64"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split(" at ")[1].split()[0]
        finally:
            server.terminate()


def plain_write(file: Path, size: int) -> dict[str, float]:
    """Seconds to write `size` bytes to a new file, and until they are on the disk."""
    start = time.perf_counter()
    with file.open("wb") as opened:
        for begin in range(0, size, BLOCK.nbytes):
            opened.write(BLOCK[: size - begin].data)
        opened.flush()
        written = time.perf_counter() - start
        os.fsync(opened.fileno())
    seconds = {"plain_write": written, "plain_write_fsync": time.perf_counter() - start}
    file.unlink()
    return seconds


def peak_memory() -> int:
    """Bytes; of this process, on Linux."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def push(
    learner: Learner, params: Params, version: int, policy: SGLangPolicy, publication: Publication
) -> dict[str, float]:
    """Seconds of the two halves of `push_weights`: until the folder is there, and until all servers serve it."""
    start = time.perf_counter()
    folder = await asyncio.to_thread(publication.write, learner, params, version)
    written = time.perf_counter()
    await serve_folder(policy, version, folder)
    loaded = time.perf_counter()
    publication.forget()
    return {"push_write": written - start, "push_load": loaded - written, "push": time.perf_counter() - start}


async def measure(learner: Learner, params: Params, urls: list[str], model: Path, disk: Path, repeats: int) -> dict:
    publication = Publication(disk / "weights", Tokenizer.load(model))
    flat, shapes = flatten_dict(params), weights.folder_shapes(learner.config)
    size = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(learner.config.dtype).itemsize
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory = peak_memory()
    rounds = []
    async with SGLangPolicy(urls) as policy:
        for version in range(1, repeats + 2):
            seconds = plain_write(disk / "plain", size)
            start = time.perf_counter()
            deque(weights.host_tensors(flat.__getitem__, learner.config, shapes), maxlen=0)
            seconds["gather"] = time.perf_counter() - start
            rounds.append(seconds | await push(learner, params, version, policy, publication))
    publication.clear()
    median = {name: statistics.median(one[name] for one in rounds[1:]) for name in rounds[0]}
    return {
        "gigabytes": size / 1e9,
        "seconds": median,
        "push_gigabytes_per_second": size / 1e9 / median["push"],
        "of_plain_write_fsync": median["plain_write_fsync"] / median["push"],
        "of_plain_write": median["plain_write"] / median["push"],
        "peak_memory_growth_gigabytes": (peak_memory() - memory) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (default: one of --shape, removed at the end)")
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny", help="of a model that is made")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of a model that is made")
    parser.add_argument("--disk", type=Path, help="folder to write to (default: the system's temporary one)")
    parser.add_argument("--url", nargs="+", help="servers that run already (default: an embedded one is started)")
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    with contextlib.ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=a.disk)))
        model = (a.model or disk / "model").absolute()
        if not model.exists():
            config = TINY if a.shape == "tiny" else SHAPES[a.shape]
            make_model(dataclasses.replace(config, dtype=a.dtype or config.dtype), model)
        learner = make_learner(read_config(model))
        params = learner.load_params(model)
        urls = a.url or [stack.enter_context(embedded_server(model))]
        result = asyncio.run(measure(learner, params, urls, model, disk, a.repeats))
    about = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__,
             "arguments": {name: value for name, value in vars(a).items() if value is not None}}  # fmt: skip
    print(json.dumps(about | result, indent=1, default=str))


if __name__ == "__main__":
    main()
