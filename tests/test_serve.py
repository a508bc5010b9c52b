"""`python -m etagent_jax.serve` on folders of every family, and on folders that it cannot serve."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import pytest
from flax import nnx

from etagent_jax import serve
from etagent_jax.model import weights
from etagent_jax.model.transformer import Family, ModelConfig
from etagent_jax.policy.interface import Completion, Sampling, Scores
from etagent_jax.policy.sglang import SGLangPolicy
from tests.families import random_model
from tests.test_tokenizer import CONFIG, tokenizer


def save(folder: Path, config: ModelConfig) -> Path:
    params = nnx.to_pure_dict(nnx.state(random_model(config), nnx.Param))
    weights.save(params, config, folder, eos_ids=tokenizer().eos_ids, pad_id=tokenizer().pad_id)
    tokenizer().save(folder)
    return folder


async def ask(url: str, ids: tuple[int, ...]) -> tuple[Scores, Completion]:
    """The scores of `ids`, and what follows them, greedily."""
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/server_info")).json()["max_queued_requests"] == 5
    async with SGLangPolicy(url) as policy:
        return await policy.score(ids), await policy.generate(ids, Sampling(0.0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", get_args(Family))
def test_a_folder_of_every_family_is_served_and_scored_as_transformers_does(family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / family, dataclasses.replace(CONFIG, family=family, tie_embeddings=family != "llama"))
    ids = tokenizer().encode_start("größer 🙂 <search>東京</search> research") * 4
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1).numpy()
    command = [sys.executable, "-m", "etagent_jax.serve", "--model", str(folder), "--port", "0", "--slots", "2",
               "--max-queued-requests", "5"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            scores, completion = asyncio.run(ask(said.split(" at ")[1].split()[0], ids))
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0
    np.testing.assert_allclose(scores.logprobs, logprobs[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
    assert completion.token_ids == (logprobs[-1].argmax(),)


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("127.0.0.1", "", False)]
)
def test_listening_beyond_this_machine_without_a_key_is_warned_of(host, key, warns, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("SGLANG_API_KEY", key)
    with pytest.raises(SystemExit, match=r"config\.json: not there"):
        serve.main(["--model", str(tmp_path), "--host", host, "--port", "0"])
    assert ("without an API key, whoever can reach 0.0.0.0:" in capsys.readouterr().err) is warns


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", "from there")
    assert serve.parse(["--model", "x"]).api_key == "from there"
    assert serve.parse(["--model", "x", "--api-key", "from here"]).api_key == "from here"
    with pytest.raises(SystemExit):
        serve.parse(["--model", "x", "--max-queued-requests", "-1"])


def test_a_folder_that_cannot_be_served_is_one_sentence_before_its_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    folder = save(tmp_path / "small", dataclasses.replace(CONFIG, vocab_size=300))
    (folder / "model.safetensors").unlink()
    size = tokenizer().vocab_size
    with pytest.raises(SystemExit, match=f"^serve: {folder}: the tokenizer has {size} tokens, .* embedding only 300"):
        serve.main(["--model", str(folder), "--port", "0"])
    save(folder, CONFIG)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=f"^serve: {folder}: context 300 exceeds the model's 256 positions"):
        serve.main(["--model", str(folder), "--port", "0", "--context", "300"])
    with pytest.raises(SystemExit, match=f"^serve: {folder}: .*safetensors"):
        serve.main(["--model", str(folder), "--port", "0"])
