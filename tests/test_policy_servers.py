"""The HTTP client with several servers: which one is asked, and what happens when they fail, hang or come back."""

import asyncio
from collections import Counter

import pytest
from starlette.responses import JSONResponse, Response

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.servers import SESSIONS
from etagent_jax.policy.sglang import TRIES, SGLangError, SGLangPolicy, Statistics
from tests.stub_servers import FAST, SAMPLING, generate_many, line_to, two_servers, until

servers = pytest.fixture(two_servers)


async def test_a_session_stays_on_its_server_and_new_ones_go_to_the_least_busy(servers):
    stubs, urls = servers
    for stub in stubs:
        stub.seconds = 0.02
    async with SGLangPolicy(urls, **FAST) as policy:
        for _ in range(3):
            await generate_many(policy, 10)
    first, second = (Counter(stub.sessions) for stub in stubs)
    assert first.keys() | second.keys() == {f"s{i}" for i in range(10)}
    assert set(first.values()) == set(second.values()) == {3}
    assert len(first) == len(second) == 5


async def test_sessions_are_forgotten(servers, monkeypatch):
    monkeypatch.setattr("etagent_jax.policy.servers.SESSIONS", 3)
    async with SGLangPolicy(servers[1], **FAST) as policy:
        await generate_many(policy, 8)
        assert len(policy._pool._sessions) == 3 < SESSIONS


async def test_all_slots_of_all_servers_are_used_and_no_more_and_waiting_for_one_is_no_delay_of_the_server(servers):
    stubs, urls = servers
    for stub in stubs:
        stub.seconds = 0.3
    async with SGLangPolicy(urls, concurrency=2, timeout=2.0, patience=2.0, backoff=0.001) as policy:
        await generate_many(policy, 40, session="")
        assert policy.statistics == Statistics(requests=40)
    assert [stub.most_running for stub in stubs] == [2, 2]
    assert min(len(stub.calls) for stub in stubs) > 15


async def test_a_cancelled_wait_for_a_slot_loses_no_slot(servers):
    (stub, _), urls = servers
    stub.held = True
    async with SGLangPolicy(urls[0], concurrency=1, **FAST) as policy:
        tasks = [asyncio.create_task(policy.generate((1,), SAMPLING)) for _ in range(6)]
        await until(lambda: len(stub.calls) == 1)
        for task in tasks[1:5]:
            task.cancel()
        stub.held = False
        assert (await tasks[5]).token_ids == (await tasks[0]).token_ids == (100,)
        assert await generate_many(policy, 3)
    assert len(stub.calls) == 5


async def test_one_of_two_servers_dead_is_slower_not_wrong_and_it_is_used_again_when_it_is_back(servers):
    stubs, urls = servers
    async with line_to(urls[0]) as (line, url), SGLangPolicy([url, urls[1]], **FAST) as policy:
        await generate_many(policy, 10)
        stubs[0].held = stubs[1].held = True
        running = asyncio.create_task(generate_many(policy, 10))
        await until(lambda: len(stubs[0].calls) + len(stubs[1].calls) == 20)
        line.cut()
        stubs[0].held = stubs[1].held = False
        completions = await running
        assert completions == [Completion((100,), (-1.0,), "stop", (0,))] * 10
        assert policy.statistics.requests == 20
        assert policy.statistics.retries == len(stubs[0].calls) + len(stubs[1].calls) - 20 > 0
        before = len(stubs[0].calls)
        await generate_many(policy, 10)
        assert len(stubs[0].calls) == before
        line.mend()
        while len(stubs[0].calls) == before:
            await generate_many(policy, 10, session="")


async def test_the_only_server_killed_in_mid_generation_and_restarted_costs_no_request_and_none_is_used_twice(servers):
    (stub, _), urls = servers
    stub.held = True
    async with line_to(urls[0]) as (line, url), SGLangPolicy(url, **FAST) as policy:
        running = asyncio.create_task(generate_many(policy, 8))
        await until(lambda: stub.paths().count("generate") == 8)
        line.cut()
        await asyncio.sleep(0.3)
        assert not running.done()
        stub.held = False
        stub.restart()
        line.mend()
        assert len(await running) == 8
        assert policy.statistics.requests == 8
    rids = [body["rid"] for path, body in stub.calls if path == "generate"]
    assert len(rids) == len(set(rids)) == 16


async def test_a_server_that_accepts_and_never_answers_loses_its_requests_to_the_other(servers):
    (stuck, good), urls = servers
    stuck.seconds = 60
    async with SGLangPolicy(urls, timeout=2.0, **FAST) as policy:
        assert len(await generate_many(policy, 12)) == 12
        late = policy.statistics.aborted
    assert 6 <= late <= 12  # at most once each
    assert late == stuck.paths().count("abort_request")
    assert late == policy.statistics.retries == stuck.paths().count("generate")
    assert good.paths().count("generate") == 12


async def test_a_request_that_makes_every_server_fail_ends_itself_and_not_the_others(servers):
    stubs, urls = servers
    async with SGLangPolicy(urls[0], **FAST) as policy:
        stubs[0].faults = [JSONResponse({"error": "cuda"}, 500) for _ in range(TRIES)]
        with pytest.raises(SGLangError, match=f"HTTP 500: cuda .{TRIES} tries"):
            await policy.generate((1,), SAMPLING)
        assert await generate_many(policy, 4)
        assert policy.statistics == Statistics(requests=4, retries=TRIES - 1)


async def test_a_server_of_half_answers_gets_no_more_requests_until_it_is_well(servers):
    (stub, other), urls = servers
    stub.faults = [Response('{"text": "')] * 1000
    async with SGLangPolicy(urls, backoff=0.05, patience=20.0) as policy:
        stub.well = False
        assert len(await generate_many(policy, 20)) == 20
        assert len(other.calls) == 20
        assert policy.statistics.retries == stub.paths().count("generate")
        asked = stub.paths().count("generate")
        assert len(await generate_many(policy, 20)) == 20
        assert stub.paths().count("generate") == asked


async def test_cancelling_ends_the_request_on_the_server(servers):
    (stub, _), urls = servers
    stub.seconds = 60
    async with SGLangPolicy(urls[0], **FAST) as policy:
        task = asyncio.create_task(policy.generate((1,), SAMPLING))
        await until(lambda: bool(stub.calls))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (_, asked), (path, told) = stub.calls
    assert (path, told["rid"]) == ("abort_request", asked["rid"])
    assert policy.statistics == Statistics(aborted=1)


async def test_a_slow_network_is_slow_and_nothing_else(servers):
    async with line_to(servers[1][0], delay=0.1) as (_, url), SGLangPolicy(url, timeout=5.0, **FAST) as policy:
        assert len(await generate_many(policy, 30)) == 30
        assert policy.statistics == Statistics(requests=30)


async def test_the_context_of_the_server_or_a_smaller_one_given_ends_a_sequence(servers):
    (stub, _), urls = servers
    for limits, context, length, most in (
        ({"context_length": 96, "max_req_input_len": 90}, None, 96, 89),
        ({"context_length": 96, "max_req_input_len": 90}, 1000, 96, 89),
        ({"context_length": 96, "max_req_input_len": 90}, 50, 50, 49),
        ({"context_length": None, "max_req_input_len": 90}, None, 90, 89),
        ({"context_length": 96}, None, 96, 95),
        ({}, 50, 50, 49),
    ):
        stub.server_info = limits
        async with SGLangPolicy(urls[0], context=context, **FAST) as policy:
            for given in (most - 20, most):
                await policy.generate((1,) * given, Sampling(1.0, 60))
                assert stub.calls[-1][1]["sampling_params"]["max_new_tokens"] == min(60, length - given)
            asked = len(stub.calls)
            for given in (most + 1, most + 2):
                assert await policy.generate((1,) * given, SAMPLING) == Completion((), (), "length", ())
            assert len(stub.calls) == asked


async def test_waiting_for_servers_says_what_for_and_leaves_none_paused(servers):
    stubs, urls = servers
    stubs[0].well, stubs[1].paused = False, True
    said = []
    async with SGLangPolicy(urls, **FAST) as policy:
        with pytest.raises(SGLangError, match=rf"not ready after 0\.3 s: {urls[0]} .*HTTP 503.*logs"):
            await policy.wait_until_ready(0.3, said.append)
        assert len(said) == 1
        assert urls[0] in said[0]
        assert not stubs[1].paused
        stubs[0].well = True
        await policy.wait_until_ready(5.0, said.append)
        assert policy.shortest_context == 96
    stubs[1].key = "secret"
    async with SGLangPolicy(urls, api_key="wrong", **FAST) as policy:
        with pytest.raises(SGLangError, match=f"{urls[1]}/continue_generation answered HTTP 401: no key"):
            await policy.wait_until_ready(60)


async def test_a_server_that_was_left_paused_is_found_and_goes_on(servers):
    (stub, _), urls = servers
    async with SGLangPolicy(urls[0], timeout=0.5, **FAST) as policy:
        stub.paused = True
        assert [c.token_ids for c in await generate_many(policy, 4)] == [(100,)] * 4
        assert not stub.paused
