"""The entry points that serve a model and ask an agent."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from etagent_jax import ask, serve
from etagent_jax.policy.interface import Completion
from etagent_jax.policy.server import make_app
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tools.search import LocalSearch
from etagent_jax.trajectory import Question
from tests.test_engine import make_engine, make_tokenizer
from tests.test_serving import KEY, running, save_model


def test_serve_refuses_what_it_cannot_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    with pytest.raises(SystemExit, match=r"config\.json: not there"):
        serve.main(["--model", str(tmp_path), "--port", "0"])
    folder = save_model(tmp_path / "model")
    with pytest.raises(SystemExit, match="context 9999 exceeds the model's 256 positions"):
        serve.main(["--model", str(folder), "--port", "0", "--context", "9999"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}"):
            serve.main(["--model", str(folder), "--port", port])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="tokenizer"):
        serve.main(["--model", str(folder), "--port", "0"])


@pytest.mark.slow
def test_serve_answers_and_ends_cleanly(tmp_path):
    folder = save_model(tmp_path)
    command = [sys.executable, "-m", "etagent_jax.serve", "--model", str(folder), "--port", "0", "--slots", "2"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert f"serving {folder} at http://127.0.0.1:" in line
            url = line.split(" at ")[1].split(" ")[0]
            body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
            response = httpx.post(f"{url}/generate", json=body, timeout=60)
            assert response.json()["meta_info"]["completion_tokens"] == 4
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        finally:
            process.kill()


def make_run(folder: Path) -> Path:
    """A run whose one finished stage is `sft`."""
    stage = folder / "sft"
    save_model(stage / "model")
    (folder / "documents.txt").write_text("one document\n")
    config = {
        "seed": 0, "questions": {"source": "files"}, "system_prompt": "Answer.",
        "tools": {"search": {"corpus": str(folder / "documents.txt"), "top_n": 1}},
        "rollout": {"calls_per_tool": 2, "calls": 2, "seconds": 60},
    }  # fmt: skip
    (stage / "config.json").write_text(json.dumps(config))
    (stage / "DONE").write_text("{}")
    (folder / "phase1").mkdir()
    return folder


def test_ask_finds_the_last_finished_stage(tmp_path):
    with pytest.raises(SystemExit, match=r"run `bash launch/quickstart\.sh` first"):
        ask.main(["What?", "--run", str(tmp_path)])
    run = make_run(tmp_path)
    assert ask.find_stage(run) == run / "sft"
    assert ask.find_stage(run / "sft") == run / "sft"


async def test_ask_shows_an_agent_at_a_server(tmp_path, capsys):
    engine = make_engine()
    with contextlib.closing(engine), running(make_app(engine, make_tokenizer(), "tiny", KEY)) as url:
        options = ["What?", "--run", str(make_run(tmp_path)), "--url", url, "--api-key", KEY, "--temperature", "1"]
        await ask.ask(ask.parse(options))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "question  What?"
    assert lines[-1].startswith(f"{url}: finish ")
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--temperature", "-1"], "temperature must be 0"), (["--url", "localhost"], "must start with http")],
)
def test_ask_refuses_bad_options(tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        ask.main(["What?", "--run", str(make_run(tmp_path)), *options])


async def test_watched_shows_blocks_as_they_come():
    tokenizer, shown = make_tokenizer(), io.StringIO()
    turns = iter(["<think>hm</think><search>the document</search>", "loose <answer>\\boxed{1}</answer>"])

    class Scripted:
        async def generate(self, token_ids, sampling, session=""):
            ids = tokenizer.encode(next(turns))
            return Completion(ids, (0.0,) * len(ids), "stop", (0,) * len(ids))

    watched = ask.Watched(Scripted(), tokenizer, Console(file=shown))
    tools = {"search": LocalSearch(["two\ndocument [bold]lines\x1b[2J"])}
    agent = Agent(watched, tokenizer, tools, "Answer.", Budget(2, 2, 1000, 60))
    await agent.rollout(Question("q", "What?", ("1",), "qa", "t"), id="t", seed=0, temperature=1.0)
    assert shown.getvalue().splitlines() == [
        "   think  hm",
        "  search  the document",
        "  result  two",
        "          document [bold]lines\N{REPLACEMENT CHARACTER}[2J",
        "    text  loose",
        "  answer  \\boxed{1}",
    ]
