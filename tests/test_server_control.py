"""What the server answers on SGLang's routes around generation: ids, aborts, pauses, versions, limits."""

import asyncio
import socket
import time

import httpx
import jax
import pytest
from flax import nnx

from etagent_jax import __version__
from etagent_jax.policy.server import make_app
from tests.test_engine import CHUNK, CONTEXT, SLOTS, Gate, make_engine, make_tokenizer, model, prompt
from tests.test_serving import running, save_model

MAX_QUEUED = 3


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


@pytest.fixture
async def client(engine):
    app = make_app(engine, make_tokenizer(), "tiny", max_queued=MAX_QUEUED, body_seconds=1.0)
    with running(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            yield client


def asked(new: int = 4, ids=(1, 2, 3), **fields) -> dict:
    return {"input_ids": list(ids), "sampling_params": {"max_new_tokens": new, "temperature": 0}, **fields}


async def post(client, path, body=None) -> tuple[int, dict | str]:
    response = await client.post(path, json={} if body is None else body)
    is_json = response.headers.get("content-type") == "application/json"
    return response.status_code, response.json() if is_json else response.text


async def waiting(client, engine, monkeypatch, count: int) -> list[asyncio.Task]:
    """Requests r0, r1, …, all of them with the engine, which is paused."""
    arrived, generate = asyncio.Semaphore(0), engine.generate
    loop = asyncio.get_running_loop()

    def spy(*args):
        loop.call_soon_threadsafe(arrived.release)
        return generate(*args)

    monkeypatch.setattr(engine, "generate", spy)
    await post(client, "/pause_generation", {"mode": "in_place"})
    tasks = [asyncio.create_task(post(client, "/generate", asked(rid=f"r{i}"))) for i in range(count)]
    for _ in tasks:
        await arrived.acquire()
    return tasks


def until(holds) -> None:
    while not holds():
        time.sleep(0.001)


async def test_an_answer_has_the_id_asked_for_and_the_tokens_found_in_the_cache(client):
    for cached in (0, 40 // CHUNK * CHUNK):
        _, answer = await post(client, "/generate", asked(ids=prompt(40), rid="é\n" * 128))
        assert answer["meta_info"]["id"] == "é\n" * 128
        assert answer["meta_info"]["cached_tokens"] == cached
    ids = {(await post(client, "/generate", asked()))[1]["meta_info"]["id"] for _ in range(2)}
    assert len(ids) == 2


async def test_an_id_in_flight_is_refused_a_second_time_and_free_afterwards(client, engine, monkeypatch):
    tasks = await waiting(client, engine, monkeypatch, 1)
    status, answer = await post(client, "/generate", asked(rid="r0"))
    assert (status, answer["error"]["message"]) == (400, "Duplicate request ID detected: r0")
    await post(client, "/continue_generation")
    assert (await tasks[0])[0] == 200
    assert (await post(client, "/generate", asked(rid="r0")))[0] == 200


async def test_a_full_queue_is_503_and_what_waits_is_served(client, engine, monkeypatch):
    tasks = await waiting(client, engine, monkeypatch, SLOTS + MAX_QUEUED)
    status, answer = await post(client, "/generate", asked())
    assert (status, answer["error"]["message"]) == (503, "The request queue is full.")
    await post(client, "/continue_generation")
    assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
    assert (await post(client, "/generate", asked()))[0] == 200


async def test_aborts_of_one_and_of_all(client, engine, monkeypatch):
    tasks = await waiting(client, engine, monkeypatch, 4)
    for body in ({}, {"rid": ""}, {"rid": "unknown"}, {"rid": "r2"}):
        assert await post(client, "/abort_request", body) == (200, "")
    status, answer = await tasks[2]
    assert (status, answer["output_ids"]) == (200, [])
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "Aborted"}
    assert [task.done() for task in tasks] == [False, False, True, False]
    assert await post(client, "/abort_request", {"rid": None, "abort_all": True}) == (200, "")
    answers = [answer for _, answer in await asyncio.gather(*tasks)]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"abort"}


async def test_scores_and_health_are_answered_during_a_pause(client, engine, monkeypatch):
    tasks = await waiting(client, engine, monkeypatch, 1)
    status, scored = await post(client, "/generate", asked(0, return_logprob=True, logprob_start_len=0))
    assert status == 200
    assert len(scored["meta_info"]["input_token_logprobs"]) == 3
    assert (await client.get("/health_generate")).status_code == 200
    assert await post(client, "/flush_cache") == (200, "Cache flushed.\n")
    assert not tasks[0].done()
    assert (await post(client, "/continue_generation"))[1]["status"] == "ok"
    assert (await tasks[0])[1]["meta_info"]["finish_reason"] == {"type": "length", "length": 4}


async def test_a_pause_aborts_unless_told_otherwise(client, engine, monkeypatch):
    tasks = await waiting(client, engine, monkeypatch, 2)
    assert (await post(client, "/pause_generation", {}))[1]["status"] == "ok"
    answers = [answer for _, answer in await asyncio.gather(*tasks)]
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"abort"}


async def test_the_cache_is_not_flushed_under_running_requests(client, engine, monkeypatch):
    gate = Gate(monkeypatch)
    running = asyncio.create_task(post(client, "/generate", asked(140)))
    await asyncio.to_thread(gate.reached.wait)
    pausing = asyncio.create_task(post(client, "/pause_generation", {"mode": "in_place"}))
    await asyncio.to_thread(until, lambda: engine._calls)
    gate.open()
    await pausing
    assert await post(client, "/flush_cache") == (400, "Flush cache failed.\n")
    await post(client, "/pause_generation", {"mode": "retract"})
    assert await post(client, "/flush_cache") == (200, "Cache flushed.\n")
    await post(client, "/continue_generation")
    assert len((await running)[1]["output_ids"]) == 140


async def test_versions_are_numbers_once_weights_have_come(client, tmp_path):
    folder = str(save_model(tmp_path / "new", seed=1))
    assert (await post(client, "/generate", asked()))[1]["meta_info"]["weight_version"] == "default"
    update = {"model_path": folder, "weight_version": "0", "flush_cache": True, "load_format": None, "is_async": False}
    status, answer = await post(client, "/update_weights_from_disk", update)
    assert (status, answer["success"], answer["num_paused_requests"]) == (200, True, 0)
    meta = (await post(client, "/generate", asked()))[1]["meta_info"]
    assert meta["weight_version"] == "0"
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
    info = (await client.get("/model_info")).json()
    assert info == (await client.get("/get_model_info")).json()
    assert info == {
        "model_path": folder, "tokenizer_path": "tiny", "is_generation": True, "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"], "weight_version": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_version": "v3"}, "weight_version, a number of at most 18 digits"),
        ({"weight_version": "9" * 19}, "a number of at most 18 digits"),
        ({"weight_version": None}, "a number"),
        ({"model_path": 3}, "needs model_path, a folder"),
        ({"is_async": True}, "field 'is_async' is not served here; leave it out, or give False"),
        ({"load_format": "dummy"}, "field 'load_format' is not served here; leave it out, or give 'auto'"),
        ({"version": "3"}, "unknown field 'version'"),
    ],
)
async def test_updates_it_cannot_do_are_refused(client, change, says):
    status, answer = await post(
        client, "/update_weights_from_disk", {"model_path": "x", "weight_version": "3"} | change
    )
    assert status == 400
    assert says in answer["error"]["message"]


async def test_the_server_says_what_it_can_hold(client):
    info = (await client.get("/server_info")).json()
    assert info == (await client.get("/get_server_info")).json()
    assert info == {
        "model_path": "tiny", "tokenizer_path": "tiny", "version": __version__, "context_length": CONTEXT,
        "max_req_input_len": CONTEXT, "max_running_requests": SLOTS, "max_queued_requests": MAX_QUEUED,
    }  # fmt: skip


NOTHING = {
    "stream": False, "return_text_in_logprobs": False, "logprob_start_len": -1, "top_logprobs_num": 0, "rid": None,
    "token_ids_logprob": [], "lora_path": None, "return_hidden_states": False, "log_metrics": True, "session_id": "s",
}  # fmt: skip
NO_SAMPLING = {
    "top_k": -1, "n": 1, "min_p": 0.0, "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    "stop_token_ids": [], "ignore_eos": False, "regex": None, "json_schema": None, "top_p": None, "stop": None,
}  # fmt: skip


async def test_sglangs_other_fields_are_taken_where_they_ask_for_nothing(client):
    _, expected = await post(client, "/generate", asked())
    given = asked(**NOTHING)
    given["sampling_params"] |= NO_SAMPLING
    status, answer = await post(client, "/generate", given)
    assert (status, answer["output_ids"]) == (200, expected["output_ids"])
    for name, value in {"stream": True, "top_logprobs_num": 2, "lora_path": "x", "token_ids_logprob": [1]}.items():
        status, answer = await post(client, "/generate", asked(**{name: value}))
        assert (status, answer["error"]["message"].split(";")[0]) == (400, f"field '{name}' is not served here")
    for name, value in {"n": 2, "regex": "a", "ignore_eos": True, "min_p": 0.1, "top_k": 5}.items():
        status, answer = await post(client, "/generate", {"input_ids": [1], "sampling_params": {name: value}})
        said = answer["error"]["message"].split(";")[0]
        assert (status, said) == (400, f"sampling parameter '{name}' is not served here")


async def test_seeds_are_random_unless_given(client):
    async def sampled(**seed) -> list[int]:
        given = {"input_ids": [1], "sampling_params": {"max_new_tokens": 20, **seed}}
        return (await post(client, "/generate", given))[1]["output_ids"]

    assert await sampled() != await sampled()
    assert await sampled(sampling_seed=3) == await sampled(sampling_seed=3) != await sampled(sampling_seed=None)


async def test_no_bound_but_the_context_where_max_new_tokens_is_null(client):
    given = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": None}}
    assert len((await post(client, "/generate", given))[1]["output_ids"]) == CONTEXT - 3


async def test_a_body_that_does_not_arrive_is_given_up(client):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        received = await asyncio.to_thread(lambda: b"".join(iter(lambda: connection.recv(4096), b"")))
    assert received.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive within 1 s" in received


async def test_weights_that_have_diverged_are_named(client, engine):
    await engine.update_weights(7, jax.tree.map(lambda x: x * float("nan"), nnx.state(model())))
    status, answer = await post(client, "/generate", asked(return_logprob=True))
    assert status == 500
    assert answer["error"]["message"] == "the weights of version 7 give log-probabilities that are not finite"


async def test_an_engine_that_has_ended_is_503(client, engine):
    await asyncio.to_thread(engine.close)
    for path, body in (("/generate", asked()), ("/flush_cache", {}), ("/abort_request", {"abort_all": True})):
        status, answer = await post(client, path, body)
        assert (status, answer["error"]["message"]) == (503, "the engine is closed; start the server again")
    for path in ("/health", "/health_generate"):
        assert (await client.get(path)).status_code == 503
