"""Servers as processes of their own: SGLang by its launcher, the embedded one, and a bad network in front of them."""

import asyncio
import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np

from etagent_jax.model import weights
from etagent_jax.model.transformer import ModelConfig, Transformer
from etagent_jax.policy.interface import Completion
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.world import World
from etagent_jax.world.vocabulary import make_tokenizer
from tests.families import as_model, random_params

ROOT = Path(__file__).parent.parent
KEY = "it's secret"
CONTEXT = 2048
CONFIG = ModelConfig(vocab_size=448, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1,
                     head_dim=16, max_position=CONTEXT)  # fmt: skip
TOKENIZER = Tokenizer(make_tokenizer(World.make(0)))
EOS = TOKENIZER.eos_ids[0]
TOLERANCE = 1e-4
ENDS = 2
"""The only one of the models that ever samples the end-of-sequence token."""


# --- what is served ------------------------------------------------------------------------------------


def _is_text(token: int) -> bool:
    text = TOKENIZER.decode([token])
    return text.isascii() and text.isprintable() and text not in ("", *TOKENIZER.special_tokens)


@functools.cache
def params(seed: int) -> weights.Params:
    """Random parameters that sample printable ASCII only, and those of ENDS the end of sequence: one hidden unit is 1
    throughout, and speaks against all others."""
    unwanted = [i for i in range(CONFIG.vocab_size) if not _is_text(i) and not (i == EOS and seed == ENDS)]
    made = random_params(CONFIG, seed, deviation=0.15)
    made["embedding"] = made["embedding"].at[:, 0].set(1.0).at[np.array(unwanted), 0].set(-40.0)
    for layer, product in (("attention", "output"), ("feed_forward", "down")):
        kernel = made["layers"][layer][product]
        kernel["kernel"] = kernel["kernel"].at[..., 0].set(0.0)
    return made


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of printable ASCII."""
    wanted = [i for i in range(TOKENIZER.vocab_size) if _is_text(i)]
    return tuple(np.random.default_rng(seed).choice(wanted, length).tolist())


def save_model(folder: Path, seed: int) -> Path:
    weights.save(params(seed), CONFIG, folder, eos_ids=(EOS,), pad_id=TOKENIZER.pad_id)
    TOKENIZER.save(folder)
    return folder


@functools.cache
def _model(seed: int) -> Transformer:
    return as_model(CONFIG, params(seed))


@jax.jit
def _logits(model: Transformer, ids: jax.Array) -> jax.Array:
    positions = jnp.arange(len(ids))[None]
    return model.logits(model(ids[None], positions, jnp.ones_like(positions)))[0]


def logits(seed: int, ids: Sequence[int]) -> np.ndarray:
    """[len(ids) - 1, vocabulary] of a float32 forward pass of model `seed`: those that each id but the first has."""
    padded = np.zeros(-len(ids) // 256 * -256, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_logits(_model(seed), padded), np.float64)[: len(ids) - 1]


def forward(seed: int, ids: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities [len(ids) - 1] of each id but the first; at temperature 0 those of 1, as servers report."""
    scaled = logits(seed, ids) / (temperature or 1.0)
    shifted = scaled - scaled.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs[np.arange(len(ids) - 1), list(ids[1:])]


def assert_sampled_by(model: int, ids: tuple[int, ...], sampled: Completion, temperature: float = 1.0) -> None:
    """The log-probabilities of what followed `ids` are those of a float32 forward pass of the model."""
    expected = forward(model, ids + sampled.token_ids, temperature)[len(ids) - 1 :]
    np.testing.assert_allclose(sampled.logprobs, expected, rtol=0, atol=TOLERANCE)


# --- who serves it -------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running server.  name: `sglang` or `embedded`.  models: the folders it may serve; the first is what it began
    with.  log: where its launcher writes.  version: of the newest update that a test made."""

    name: str
    url: str
    models: Sequence[Path]
    log: Path
    version: int = 0

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def process(self) -> int:
        """The process that serves now, as its launcher says."""
        return int(re.findall(r"\(process (\d+)", self.log.read_text())[-1])

    def starts(self) -> int:
        """How often it has become ready."""
        return self.log.read_text().count(" serving ")

    @contextlib.asynccontextmanager
    async def asks(self) -> AsyncIterator[Callable[..., Any]]:
        """A function `ask(path, **body)` that posts, and gives the answer's status and JSON."""
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, trust_env=False) as client:

            async def ask(path: str, **body: Any) -> tuple[int, Any]:
                answer = await client.post(path, json=body)
                is_json = answer.headers.get("content-type", "").startswith("application/json")
                return answer.status_code, answer.json() if is_json else answer.text

            yield ask


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def sglang(models: Sequence[Path], folder: Path, *flags: str) -> Iterator[Server]:
    """A real SGLang server on the CPU, started by the launcher; SGLANG_VENV names another virtual environment."""
    port = free_port()
    venv = os.environ.get("SGLANG_VENV")
    command = ["bash", str(ROOT / "launch" / "sglang_server.sh"), "--cpu", f"--model={models[0]}", f"--port={port}"]
    command += ([f"--venv={venv}"] if venv else []) + ["--", *flags]
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / f"launcher-{port}.log", f"at {url} ", TMPDIR=str(folder)) as log:
        yield Server("sglang", url, models, log)


@contextlib.contextmanager
def embedded(models: Sequence[Path], folder: Path, *flags: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "etagent_jax.serve", f"--model={models[0]}", f"--port={port}", f"--api-key={KEY}",
               f"--context={CONTEXT}", "--slots=32", *flags]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / f"embedded-{port}.log", f"at {url} ") as log:
        yield Server("embedded", url, models, log)


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path, ready: str, **environment: str) -> Iterator[Path]:
    """The command, from when it has said `ready` until SIGTERM; it must then end with status 0."""
    environment = {**os.environ, "SGLANG_API_KEY": KEY, "PYTHONUNBUFFERED": "1", **environment}
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment) as process,
    ):
        try:
            while ready not in log.read_text():
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.2)
            yield log
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, log.read_text()[-3000:]


# --- what lies between ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def bad_network(url: str, seconds: float, drop_every: int) -> AsyncIterator[tuple[str, Callable[[], int]]]:
    """A URL behind which all bytes arrive late, and every so-many-th connection breaks in the middle of the answer;
    with it a function that tells how many broke."""
    host, port = url.removeprefix("http://").split(":")
    connections, dropped = itertools.count(1), 0

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, broken: bool) -> None:
        nonlocal dropped
        while data := await reader.read(65536):
            await asyncio.sleep(seconds)
            if broken:
                dropped += 1
                writer.write(data[: len(data) // 2])
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken = next(connections) % drop_every == 0
        there = await asyncio.open_connection(host, int(port))
        both = carry(reader, there[1], False), carry(there[0], writer, broken)
        await asyncio.gather(*both, return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lambda: dropped
    finally:
        server.close()
