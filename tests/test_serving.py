"""The HTTP client and server against the engine itself."""

import asyncio
import contextlib
import json
import socket
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from etagent_jax.model import weights
from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.server import make_app
from etagent_jax.policy.sglang import TRIES, SGLangError, SGLangPolicy
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
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
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


def save_model(folder: Path, seed: int = 0) -> Path:
    weights.save(model(seed), folder, eos_id=make_tokenizer().eos_ids[0], pad_id=0)
    make_tokenizer().save(folder)
    return folder


def stub(*answers: Response, path: str = "/generate") -> tuple[Starlette, list[dict]]:
    """A server that gives `answers` in turn, the last one again and again, and the bodies it was sent."""
    bodies: list[dict] = []

    async def answer(request: Request) -> Response:
        bodies.append(await request.json())
        return answers[min(len(bodies), len(answers)) - 1]

    return Starlette(routes=[Route(path, answer, methods=["POST"])]), bodies


def sglang_answer(**meta) -> JSONResponse:
    return JSONResponse({"text": "", "output_ids": [], "meta_info": {"id": "r", "prompt_tokens": 1} | meta})


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


async def test_weights_from_disk(tmp_path, engine, policy):
    await policy.update_weights(3, save_model(tmp_path / "new", seed=1))
    info = await policy.model_info()
    assert info["model_path"] == str(tmp_path / "new")
    assert info["weight_version"] == "3"
    completion = await policy.generate(prompt(20), Sampling(1.0, 9))
    assert completion.weight_versions == (3,) * 9
    with pytest.raises(SGLangError, match=r"HTTP 400: .*config\.json: not there"):
        await policy.update_weights(4, tmp_path / "nowhere")
    assert (await policy.generate(prompt(20), Sampling(1.0, 9))) == completion


async def test_a_client_that_leaves_frees_its_slot(engine, policy, monkeypatch):
    cancelled, generate = threading.Event(), engine.generate

    async def spy(*args):
        try:
            return await generate(*args)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    monkeypatch.setattr(engine, "generate", spy)
    gate = Gate(monkeypatch)
    request = asyncio.create_task(policy.generate(prompt(5), Sampling(1.0, 150)))
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
        (IDS | {"strem": True}, "unknown field 'strem'"),
        (IDS | {"\ud800": True}, "unknown field"),
        (IDS | {"sampling_params": [1]}, "must be an object"),
        (sampling(temprature=1), "unknown sampling parameter 'temprature'; there are temperature, top_p"),
        (sampling(temperature="hot"), "temperature must be of type float"),
        (sampling(temperature=-1), "temperature must be 0 or at least"),
        (sampling(temperature=1e-30), "temperature must be 0 or at least"),
        (sampling(temperature=float("nan")), "temperature"),
        (sampling(temperature=10**400), "temperature is too large"),
        (sampling(top_p=0), "top_p must be in"),
        (sampling(top_k=20), "top_k must be -1"),
        (sampling(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (sampling(max_new_tokens=True), "max_new_tokens must be of type int"),
        (sampling(stop=3), "stop must be a string"),
        (sampling(stop=["é"]), "must be ASCII"),
        (sampling(stop=["a" * 2000]), "1024 characters in all"),
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


# --- what the client makes of other servers ----------------------------------------------------------


async def test_answers_are_read_as_sglang_means_them():
    rows = [[-0.5, 7, None], [-1.0, 8, "x"], [-2.0, 9, None]]
    usual = sglang_answer(
        completion_tokens=2, output_token_logprobs=rows, weight_version="default", finish_reason={"type": "stop"}
    )
    spans = [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 3}]
    across = sglang_answer(
        completion_tokens=3, output_token_logprobs=rows, weight_version="5", weight_versions=spans,
        finish_reason={"type": "length", "length": 3},
    )  # fmt: skip
    aborted = sglang_answer(completion_tokens=0, output_token_logprobs=[], finish_reason={"type": "abort"})
    app, bodies = stub(usual, across, aborted)
    with running(app) as url:
        async with SGLangPolicy(url) as policy:
            got = [await policy.generate((1, 2), Sampling(0.7, 9, ("</a>",), 0.9, seed=5), "s") for _ in range(3)]
    assert got == [
        Completion((8, 9), (-1.0, -2.0), "stop", (0, 0)),  # the last two rows
        Completion((7, 8, 9), (-0.5, -1.0, -2.0), "length", (4, 5, 5)),
        Completion((), (), "abort", ()),
    ]
    expected = {
        "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_new_tokens": 9, "stop": ["</a>"], "sampling_seed": 5,
        "no_stop_trim": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    assert bodies[0] == {"input_ids": [1, 2], "return_logprob": True, "sampling_params": expected}


@pytest.mark.parametrize(
    "answer",
    [
        Response("busy"),
        JSONResponse([1]),
        JSONResponse({"text": "a"}),
        sglang_answer(completion_tokens=2, output_token_logprobs=[[-1.0, 7, None]], finish_reason={"type": "stop"}),
        sglang_answer(
            completion_tokens=0, finish_reason={"type": "stop"}, output_token_logprobs=None, weight_versions=3
        ),
        sglang_answer(completion_tokens=1, output_token_logprobs=[[-1.0, 7, None]], finish_reason={"type": "odd"}),
        sglang_answer(
            completion_tokens=1,
            output_token_logprobs=[[-1.0, 7, None]],
            finish_reason={"type": "stop"},
            weight_version="final",
        ),
    ],
)
async def test_answers_that_make_no_sense_name_the_server(answer):
    app, _ = stub(answer)
    with running(app) as url:
        async with SGLangPolicy(url) as policy:
            with pytest.raises(SGLangError, match=url):
                await policy.generate((1,), Sampling(1.0, 4))


async def test_5xx_is_tried_again_and_4xx_is_not(policy):
    good = sglang_answer(completion_tokens=1, output_token_logprobs=[[-1.0, 7, None]], finish_reason={"type": "length"})
    loading = JSONResponse({"error": {"message": "loading"}}, 503)
    for answers, tries, says in (
        ([loading, loading, good], 3, None),
        ([loading], TRIES, f"HTTP 503 .{TRIES} tries.: loading"),
        ([JSONResponse({"error": {"message": "too long"}}, 400)], 1, "HTTP 400: too long"),
        ([JSONResponse(["odd"], 422)], 1, 'HTTP 422: ."odd"'),
    ):
        app, bodies = stub(*answers)
        with running(app) as url:
            async with SGLangPolicy(url, backoff=0.001) as policy:
                if says is None:
                    assert (await policy.generate((1,), Sampling(1.0, 4))).token_ids == (7,)
                else:
                    with pytest.raises(SGLangError, match=says):
                        await policy.generate((1,), Sampling(1.0, 4))
        assert len(bodies) == tries


async def test_an_unknown_id_never_leaves_the_client():
    app, bodies = stub(Response("{}"))
    with running(app) as url:
        async with SGLangPolicy(url, vocab_size=100) as policy:
            for ids in ((1, 100), (-1,), ()):
                with pytest.raises(ValueError, match=r"outside the vocabulary of 100|no tokens given"):
                    await policy.generate(ids, Sampling(1.0, 4))
    assert bodies == []


async def test_an_unreachable_server_a_slow_one_and_a_wrong_key_are_named(url):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with SGLangPolicy(nowhere, backoff=0.001) as policy:
            with pytest.raises(SGLangError, match=rf"{nowhere}/generate cannot be reached .*is the server up\?"):
                await policy.generate((1,), Sampling(1.0, 4))
        closed.listen()
        async with SGLangPolicy(nowhere, timeout=0.05, backoff=0.001) as policy:
            with pytest.raises(SGLangError, match=rf"{nowhere}/generate did not answer within 0\.05 s"):
                await policy.generate((1,), Sampling(1.0, 4))
    async with SGLangPolicy(url, api_key="wrong") as policy:
        with pytest.raises(SGLangError, match="HTTP 401: wrong or missing API key"):
            await policy.generate((1,), Sampling(1.0, 4))
    with pytest.raises(ValueError, match="must start with http"):
        SGLangPolicy("localhost:30000")
