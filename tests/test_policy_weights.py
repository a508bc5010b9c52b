"""The HTTP client and weights: they reach every server, no answer of older ones is used, other models are refused."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from etagent_jax.policy.interface import Completion
from etagent_jax.policy.likeness import SAMPLE
from etagent_jax.policy.sglang import TRIES, SGLangError, SGLangPolicy
from tests.stub_servers import FAST, SAMPLING, StubServer, generate_many, line_to, two_servers, until
from tests.test_serving import running
from tests.test_tokenizer import tokenizer

servers = pytest.fixture(two_servers)
UPDATE = ["pause_generation", "update_weights_from_disk", "flush_cache", "continue_generation"]


def completion(version: int) -> Completion:
    return Completion((100 + version,), (-1.0,), "stop", (version,))


async def test_an_update_reaches_every_server_and_is_no_staleness_of_what_was_under_way(servers):
    stubs, urls = servers
    stubs[0].held = stubs[1].held = True
    async with SGLangPolicy(urls, **FAST) as policy:
        assert policy.version == 0
        running = asyncio.create_task(generate_many(policy, 6))
        await until(lambda: sum(stub.paths().count("generate") for stub in stubs) == 6)
        await policy.update_weights(1, "/w/1")
        assert policy.version == 1
        stubs[0].held = stubs[1].held = False
        assert await running == [Completion((100, 101), (-1.0, -1.0), "stop", (0, 1))] * 6
        assert await generate_many(policy, 6) == [completion(1)] * 6
        assert (policy.statistics.retries, policy.statistics.stale) == (0, 0)
    for stub in stubs:
        assert [path for path in stub.paths() if path != "generate"] == UPDATE
        told = dict(stub.calls)
        assert told["pause_generation"] == {"mode": "retract"}
        assert told["update_weights_from_disk"] == {"model_path": "/w/1", "weight_version": "1"}


async def test_a_folder_that_a_server_refuses_is_an_error_and_all_go_on_with_the_old_weights(servers):
    stubs, urls = servers
    async with SGLangPolicy(urls, **FAST) as policy:
        await policy.update_weights(1, "/w/1")
        with pytest.raises(SGLangError, match=r"/update_weights_from_disk answered HTTP 400: no /nowhere"):
            await policy.update_weights(2, "/nowhere")
        assert policy.version == 1
        assert not any(stub.paused for stub in stubs)
        assert await generate_many(policy, 4) == [completion(1)] * 4


async def test_two_updates_do_not_overlap(servers):
    stubs, urls = servers
    async with SGLangPolicy(urls, **FAST) as policy:
        await asyncio.gather(policy.update_weights(1, "/w/1"), policy.update_weights(2, "/w/2"))
        assert policy.version == 2
    for stub in stubs:
        assert stub.paths() == UPDATE * 2


async def test_an_update_that_the_server_does_not_report_is_an_error(servers):
    (stub, _), urls = servers
    stub.says_version = "7"
    async with SGLangPolicy(urls[0], **FAST) as policy:
        with pytest.raises(SGLangError, match=f"{urls[0]} reports weight version 7 after it was given 1 from /w/1"):
            await policy.update_weights(1, "/w/1")


async def test_a_server_that_comes_back_with_old_weights_gets_the_new_once_and_its_answers_are_not_used(servers):
    (stub, _), urls = servers
    stub.seconds = 0.05
    async with SGLangPolicy(urls[0], **FAST) as policy:
        await policy.update_weights(2, "/w/2")
        stub.restart()
        del stub.calls[:]
        assert await generate_many(policy, 12) == [completion(2)] * 12
        assert policy.statistics.stale == 12
        assert policy.statistics.brought_up_to_date == 1
    assert [path for path in stub.paths() if path != "generate"] == UPDATE


async def test_who_only_expects_a_version_sees_that_servers_have_it(servers):
    stubs, urls = servers
    async with SGLangPolicy(urls, **FAST) as policy:
        policy.expect(3, "/w/3")
        assert await generate_many(policy, 4) == [completion(3)] * 4
        assert policy.statistics.brought_up_to_date == 2
        stubs[0].version = "4"  # newer is no fault
        assert {c.weight_versions for c in await generate_many(policy, 4)} == {(3,), (4,)}
        assert policy.statistics.brought_up_to_date == 2


async def test_a_server_whose_answers_are_not_of_the_version_that_it_reports_is_an_error(servers):
    (stub, _), urls = servers
    async with SGLangPolicy(urls[0], **FAST) as policy:
        await policy.update_weights(2, "/w/2")
        stub.version, stub.says_version = "1", "2"
        with pytest.raises(SGLangError, match=rf"{urls[0]}.* older than version 2, .* \({TRIES} tries\)"):
            await policy.generate((1,), SAMPLING)
    assert stub.paths().count("generate") == TRIES


async def test_an_update_goes_past_a_dead_server_which_is_given_it_before_it_is_used_again(servers):
    (dead, alive), urls = servers
    async with line_to(urls[0]) as (line, url), SGLangPolicy([url, urls[1]], **FAST) as policy:
        await policy.update_weights(1, "/w/1")
        line.cut()
        await policy.update_weights(2, "/w/2")
        assert (dead.version, alive.version) == ("1", "2")
        assert await generate_many(policy, 4) == [completion(2)] * 4
        dead.restart()
        line.mend()
        while "generate" not in dead.paths():
            assert await generate_many(policy, 4, session="") == [completion(2)] * 4
        assert policy.statistics.stale == 0
        assert policy.statistics.brought_up_to_date == 1


async def test_an_update_waits_for_a_server_when_all_are_away_but_not_for_ever(servers):
    (stub, _), urls = servers
    async with line_to(urls[0]) as (line, url), SGLangPolicy(url, backoff=0.002) as policy:
        line.cut()
        async with SGLangPolicy(url, backoff=0.002, patience=0.3) as impatient:
            with pytest.raises(SGLangError, match=rf"no SGLang server .* within 0\.3 s: {url}"):
                await impatient.update_weights(1, "/w/1")
        update = asyncio.create_task(policy.update_weights(1, "/w/1"))
        await asyncio.sleep(0.1)
        line.mend()
        await update
        assert await policy.generate((1,), SAMPLING) == completion(1)
    assert stub.version == "1"


@asynccontextmanager
async def router(stubs: list[StubServer], urls: list[str]):
    """The URL of a router that asks the workers in turn."""
    turn = iter(range(10**6))

    async def generate(request: Request) -> Response:
        return await stubs[next(turn) % len(stubs)].answer(request)

    async def workers(request: Request) -> Response:
        return JSONResponse({"workers": [{"url": url} for url in urls]})

    routes = [Route("/generate", generate, methods=["POST"]), Route("/workers", workers)]
    with running(Starlette(routes=[*routes, Route("/health", lambda request: Response())])) as url:
        yield url


async def test_through_a_router_requests_go_to_it_and_weights_to_each_of_its_workers(servers):
    stubs, urls = servers
    async with router(stubs, urls) as url, SGLangPolicy(url, **FAST) as policy:
        await policy.wait_until_ready(10)
        await policy.update_weights(1, "/w/1")
        assert await generate_many(policy, 6) == [completion(1)] * 6
        assert [len(stub.sessions) for stub in stubs] == [3, 3]
        assert {*stubs[0].sessions, *stubs[1].sessions} == {f"s{i}" for i in range(6)}
        stubs[1].restart()
        for stub in stubs:
            del stub.calls[:]
        assert await generate_many(policy, 6) == [completion(1)] * 6
        assert policy.statistics.brought_up_to_date == 1
        assert "update_weights_from_disk" not in stubs[0].paths()
        assert [path for path in stubs[1].paths() if path != "generate"] == UPDATE
        stubs[0].seconds = stubs[1].seconds = 60
        asked = [len(stub.calls) for stub in stubs]
        task = asyncio.create_task(policy.generate((1,), SAMPLING))
        await until(lambda: [len(stub.calls) for stub in stubs] != asked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [stub.paths().count("abort_request") for stub in stubs] == [1, 1]


async def test_memory_is_released_and_resumed_on_all_servers(servers):
    stubs, urls = servers
    async with SGLangPolicy(urls, **FAST) as policy:
        await policy.release_memory()
        await policy.resume_memory()
    for stub in stubs:
        assert stub.paths() == ["abort_request", "flush_cache", "release_memory_occupation", "resume_memory_occupation"]


async def test_a_server_of_another_model_or_tokenizer_is_refused_with_both_names(servers, tmp_path):
    stubs, urls = servers
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    config = {"model_type": "qwen2", "hidden_size": 64, "vocab_size": 448}
    for folder, changes in ((ours, {}), (theirs, {"hidden_size": 128})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | changes))
    learners = tokenizer()
    async with SGLangPolicy(urls, **FAST) as policy:
        for stub in stubs:
            stub.encoded = list(learners.encode_start(SAMPLE + "".join(learners.special_tokens)))
        await policy.check(learners, ours)
        assert policy.vocab_size == 448
        stubs[1].encoded[3] += 1
        with pytest.raises(
            SGLangError, match=rf"{urls[1]} has the tokenizer of /model, another than {ours}'s: token 3"
        ):
            await policy.check(learners, ours)
        stubs[1].model_info["model_type"] = "llama"
        with pytest.raises(
            SGLangError, match=rf"{urls[1]} serves /model, whose model_type is llama, and {ours} has qwe"
        ):
            await policy.check(learners, ours)
        stubs[0].model_info["model_path"] = str(theirs)
        with pytest.raises(
            SGLangError, match=rf"{urls[0]} serves {theirs}, whose hidden_size is 128, and {ours} has 64"
        ):
            await policy.check(learners, ours)
