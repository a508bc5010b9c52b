"""The HTTP client and server against the engine itself."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn
from flax import nnx
from starlette.applications import Starlette

from etagent_jax.model import weights
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.interface import Sampling
from etagent_jax.policy.server import make_app
from etagent_jax.policy.sglang import SGLangError, SGLangPolicy
from etagent_jax.rollout.agent import Agent, Budget
from etagent_jax.tools.search import LocalSearch
from etagent_jax.trajectory import Question, Segment
from tests.test_engine import CONFIG, CONTEXT, Gate, make_engine, make_tokenizer, model, prompt

KEY = "secret"


@contextlib.contextmanager
def running(app: Starlette):
    """The app behind a real HTTP server in a thread; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    # uvicorn's own logging would hold on to a captured stderr
    server = uvicorn.Server(
        uvicorn.Config(app, http="h11", log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


@pytest.fixture
def url(engine):
    with running(make_app(engine, make_tokenizer(), "tiny", KEY)) as url:
        yield url


@pytest.fixture
async def policy(url):
    async with SGLangPolicy(url, api_key=KEY, vocab_size=CONFIG.vocab_size, backoff=0.01) as policy:
        yield policy


def save_model(folder: Path, seed: int = 0, config: ModelConfig = CONFIG) -> Path:
    weights.save(nnx.to_pure_dict(nnx.state(model(seed))), config, folder, eos_ids=make_tokenizer().eos_ids, pad_id=0)
    make_tokenizer().save(folder)
    return folder


# --- the client and the server -----------------------------------------------------------------------


async def test_http_changes_neither_ids_nor_logprobs(engine, policy):
    free = await engine.generate(prompt(30), Sampling(1.0, 40, seed=5))
    stop = make_tokenizer().decode(free.token_ids[9:12])
    samplings = [
        Sampling(1.0, 40, seed=5),
        Sampling(0.7, 20, (stop,), top_p=0.9, seed=2**31),
        Sampling(0.0, 30),
        Sampling(1.0, 40, (stop,), seed=5),
    ]
    expected = await asyncio.gather(*(engine.generate(prompt(30), s, "a") for s in samplings))
    assert expected[3].finish == "stop"
    over_http = await asyncio.gather(*(policy.generate(prompt(30), s, "fráge/1\n") for s in samplings))
    assert over_http == expected


async def test_an_agent_rolls_out_over_http(engine, policy):
    tokenizer, tools = make_tokenizer(), {"search": LocalSearch(["one document"])}
    question = Question("q", "What?", ("x",), "qa", "test")
    call = "<search>document</search>"
    prefix = [Segment("program", tokenizer.encode(call), call)]
    budget = Budget(calls_per_tool=2, calls=2, context=CONTEXT, seconds=60)
    trajectories = [
        await Agent(p, tokenizer, tools, "Answer.", budget).rollout(
            question, id="t", seed=3, temperature=1.0, prefix=prefix
        )
        for p in (engine, policy)
    ]
    for trajectory in trajectories:
        assert [s.source for s in trajectory.segments] == ["program", "tool", "model"]
        assert trajectory.finish == "length"
    assert trajectories[0].token_ids == trajectories[1].token_ids
    assert trajectories[0].segments[-1] == trajectories[1].segments[-1]


async def test_scores_over_http_are_the_engines(engine, policy):
    for length in (1, 2, 30, CONTEXT):
        assert await policy.score(prompt(length)) == await engine.score(prompt(length))
    await engine.update_weights(5, nnx.state(model(1)))
    assert (await policy.score(prompt(30))).weight_version == 5


@pytest.mark.parametrize("new", [0, 4])
async def test_input_logprobs_begin_where_asked_the_first_of_them_null(engine, url, new):
    ids = prompt(30)
    scores = [None, *(await engine.score(ids)).logprobs]
    parameters = {"max_new_tokens": new, "temperature": 0}
    asked = {"input_ids": ids, "return_logprob": True, "sampling_params": parameters}
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for start, first in ((0, 0), (1, 1), (12, 12), (29, 29), (30, 30), (-1, 30), (None, 30)):
            answer = (await client.post(f"{url}/generate", json=asked | {"logprob_start_len": start})).json()
            rows = answer["meta_info"]["input_token_logprobs"]
            expected = zip([None, *scores[first + 1 :]], ids[first:], strict=first < 30)
            assert rows == [[logprob, i, None] for logprob, i in expected]
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": new}
            assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"]) == new
            assert answer["meta_info"]["weight_version"] == "default"
            assert [row[1] for row in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
        unasked = (await client.post(f"{url}/generate", json=asked | {"return_logprob": False})).json()
        assert not {"input_token_logprobs", "output_token_logprobs"} & unasked["meta_info"].keys()


async def test_weights_from_disk(tmp_path, engine, policy):
    await policy.update_weights(3, save_model(tmp_path / "new", seed=1))
    info = await policy.model_info()
    assert info["model_path"] == str(tmp_path / "new")
    assert info["weight_version"] == "3"
    completion = await policy.generate(prompt(20), Sampling(1.0, 9))
    assert completion.weight_versions == (3,) * 9
    with pytest.raises(SGLangError, match=r"HTTP 400: .*config\.json: not there"):
        await policy.update_weights(4, tmp_path / "nowhere")
    other = save_model(tmp_path / "other", seed=1, config=dataclasses.replace(CONFIG, rope_theta=5.0))
    with pytest.raises(SGLangError, match=r"HTTP 400: .*other: rope_theta is 5\.0, the served model's 1000000\.0"):
        await policy.update_weights(4, other)
    assert (await policy.generate(prompt(20), Sampling(1.0, 9))) == completion


async def test_a_client_that_leaves_frees_its_slot(engine, url, policy, monkeypatch):
    cancelled, generate = threading.Event(), engine.generate

    async def spy(*args):
        try:
            return await generate(*args)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    monkeypatch.setattr(engine, "generate", spy)
    gate = Gate(monkeypatch)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
        body = {"input_ids": prompt(5), "sampling_params": {"max_new_tokens": 150}}
        request = asyncio.create_task(client.post(f"{url}/generate", json=body))
        await asyncio.to_thread(gate.reached.wait)
        request.cancel()
        await asyncio.to_thread(cancelled.wait)
    gate.open()
    assert len((await policy.generate(prompt(9), Sampling(1.0, 4))).token_ids) == 4
    assert engine.statistics.sampled < 100


# --- what the server refuses -------------------------------------------------------------------------

IDS = {"input_ids": [1, 2, 3]}


def sampling(**parameters) -> dict:
    return IDS | {"sampling_params": parameters}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        ([1, 2], "must be a JSON object"),
        ({}, "either input_ids"),
        (IDS | {"text": "a"}, "either input_ids"),
        ({"text": ["a"]}, "text must be one string"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"input_ids": [[1]]}, "one list of integers"),
        ({"input_ids": [1.0]}, "one list of integers"),
        ({"input_ids": [True]}, "one list of integers"),
        ({"input_ids": []}, "0 tokens given"),
        ({"input_ids": [CONFIG.vocab_size]}, "outside the vocabulary of 128"),
        ({"input_ids": [-1]}, "outside the vocabulary"),
        ({"input_ids": [10**30]}, "outside the vocabulary"),
        ({"input_ids": [1] * CONTEXT}, "an input has 1 to 159"),
        (IDS | {"logprob_start_len": 4}, "logprob_start_len must be -1 (none) or 0 to 3 tokens, got 4"),
        (IDS | {"logprob_start_len": -2}, "logprob_start_len must be"),
        (IDS | {"logprob_start_len": True}, "logprob_start_len must be"),
        (IDS | {"strem": True}, "unknown field 'strem'"),
        (IDS | {"\ud800": True}, "unknown field"),
        (IDS | {"sampling_params": [1]}, "sampling_params must be of type dict"),
        (sampling(temprature=1), "unknown sampling parameter 'temprature'; there are temperature, top_p"),
        (sampling(temperature="hot"), "temperature must be of type float"),
        (sampling(temperature=-1), "temperature must be 0 or at least"),
        (sampling(temperature=1e-30), "temperature must be 0 or at least"),
        (sampling(temperature=float("nan")), "NaN is no number of JSON"),
        (sampling(temperature=10**400), "temperature is too large"),
        (sampling(top_p=0), "top_p must be in"),
        (sampling(top_k=20), "sampling parameter 'top_k' is not served here; leave it out, or give -1"),
        (sampling(max_new_tokens=-1), "max_new_tokens must be at least 1"),
        (sampling(max_new_tokens=True), "max_new_tokens must be of type int"),
        (sampling(stop=3), "stop must be a string"),
        (sampling(stop=["é"]), "must be ASCII"),
        (sampling(stop=["a" * 2000]), "256 characters in all"),
    ],
)
async def test_malformed_requests_are_400_with_a_sentence(url, body, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
        response = await client.post(f"{url}/generate", content=content)
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]
        assert (await client.post(f"{url}/generate", json=sampling(max_new_tokens=2))).status_code == 200


async def test_size_key_and_health(engine, url):
    big = json.dumps({"input_ids": [1] * 2_000_000})
    async with httpx.AsyncClient() as client:
        for path, method in (("generate", "POST"), ("get_model_info", "GET"), ("update_weights_from_disk", "POST")):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                response = await client.request(method, f"{url}/{path}", headers=headers, content=b"{}")
                assert response.status_code == 401
        authorised = {"Authorization": f"Bearer {KEY}"}
        assert (await client.post(f"{url}/generate", headers=authorised, content=big)).status_code == 413
        assert (await client.get(f"{url}/generate", headers=authorised)).status_code == 405
        assert (await client.get(f"{url}/health")).status_code == 200
        engine.close()
        assert (await client.get(f"{url}/health")).status_code == 503


async def test_text_is_for_people(engine, url):
    """As SGLang does it: trimmed at the stop string and without special tokens, unless asked otherwise."""
    tokenizer = make_tokenizer()
    given = "aba x"
    free = await engine.generate(tokenizer.encode(given), Sampling(1.0, 30, seed=1))
    text = tokenizer.decode(free.token_ids)
    stop = text[4:6]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for kept, expected in ((True, text[: text.find(stop) + 2]), (False, text[: text.find(stop)])):
            parameters = {"max_new_tokens": 30, "stop": stop, "no_stop_trim": kept, "sampling_seed": 1}
            response = await client.post(f"{url}/generate", json={"text": given, "sampling_params": parameters})
            answer = response.json()
            assert answer["text"].startswith(expected)
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
            assert "output_token_logprobs" not in answer["meta_info"]


async def test_a_key_may_have_any_characters(engine):
    with running(make_app(engine, make_tokenizer(), "tiny", "schlüssel 東")) as url:
        async with httpx.AsyncClient() as client:
            for key, status in (("schlüssel 東", 200), ("schlüssel", 401)):
                headers = {"Authorization": f"Bearer {key}".encode()}
                assert (await client.get(f"{url}/model_info", headers=headers)).status_code == status


async def test_a_wrong_key_is_named(url):
    async with SGLangPolicy(url, api_key="wrong") as policy:
        with pytest.raises(SGLangError, match="HTTP 401: wrong or missing API key"):
            await policy.generate((1,), Sampling(1.0, 4))
