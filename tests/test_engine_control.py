"""Pausing the embedded engine, ending its requests early, and emptying its cache."""

import asyncio

import numpy as np
import pytest
from flax import nnx

from etagent_jax.policy.interface import Sampling
from tests.test_engine import CHUNK, SLOTS, Gate, forward_logprobs, make_engine, model, prompt

STEPS = 64  # of the compiled loop, before the thread looks at its calls


def sampled_in_a_run(given: int) -> int:
    """The steps, but those that fill in what prefill left of the given tokens."""
    return STEPS - (given - (given - 1) // CHUNK * CHUNK) + 1


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


async def held(engine, monkeypatch, *requests):
    """Tasks of `requests`, after one run of the loop for as many as there are slots, and the gate that holds them."""
    await engine.pause("in_place")
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    gate = Gate(monkeypatch)
    await engine.resume()
    await asyncio.to_thread(gate.reached.wait)
    return gate, tasks


async def after_the_gate(gate, call):
    """What the call returns; it was made while the gate was shut, so nothing runs between the two."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0)
    gate.open()
    return await task


async def two_turns_of_the_thread(engine):
    for _ in range(2):
        await engine.score(prompt(5))


def assert_forward(ids, completion):
    """Each token's log-probability is that of the weights of its version (seed = version)."""
    for version in set(completion.weight_versions):
        expected = forward_logprobs(ids, completion.token_ids, 1.0, version)
        chosen = np.array(completion.weight_versions) == version
        np.testing.assert_allclose(np.array(completion.logprobs)[chosen], expected[chosen], atol=1e-4)


@pytest.mark.parametrize(("mode", "flushes"), [("in_place", False), ("retract", True)])
async def test_paused_requests_stay_and_go_on_with_new_weights(engine, monkeypatch, mode, flushes):
    gate, (running,) = await held(engine, monkeypatch, engine.generate(prompt(20), Sampling(1.0, 130, seed=2)))
    await after_the_gate(gate, engine.pause(mode))
    new = asyncio.create_task(engine.generate(prompt(20, 1), Sampling(1.0, 4)))
    await two_turns_of_the_thread(engine)
    assert not running.done()
    assert not new.done()
    assert await engine.flush_cache() is flushes
    await engine.update_weights(1, nnx.state(model(1)))
    assert (await engine.score(prompt(5))).weight_version == 1
    await engine.resume()
    completion, old = await running, sampled_in_a_run(20)
    assert completion.finish == "length"
    assert completion.weight_versions == (0,) * old + (1,) * (130 - old)
    assert_forward(prompt(20), completion)
    assert (await new).weight_versions == (1,) * 4


async def test_what_was_flushed_under_a_request_changes_nothing_of_it(engine, monkeypatch):
    expected = await engine.generate(prompt(20), Sampling(1.0, 130, seed=2))
    await engine.flush_cache()
    gate, (running,) = await held(engine, monkeypatch, engine.generate(prompt(20), Sampling(1.0, 130, seed=2)))
    await after_the_gate(gate, engine.pause("retract"))
    computed = engine.statistics.computed
    assert await engine.flush_cache()
    await engine.resume()
    completion = await running
    assert completion.token_ids == expected.token_ids
    np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)
    assert engine.statistics.computed - computed == 20 + 130 - 1


async def test_a_pause_that_aborts_returns_what_open_requests_have(engine, monkeypatch):
    requests = [engine.generate(prompt(9), Sampling(1.0, 140, seed=i)) for i in range(SLOTS + 3)]
    gate, tasks = await held(engine, monkeypatch, *requests)
    await after_the_gate(gate, engine.pause("abort"))
    completions = await asyncio.gather(*tasks)
    assert {c.finish for c in completions} == {"abort"}
    assert [len(c.token_ids) for c in completions] == [sampled_in_a_run(9)] * SLOTS + [0] * 3
    assert_forward(prompt(9), completions[0])
    new = asyncio.create_task(engine.generate(prompt(9), Sampling(1.0, 4)))
    await two_turns_of_the_thread(engine)
    assert not new.done()
    await engine.resume()
    assert (await new).finish == "length"


async def test_an_abort_ends_the_request_of_that_id_alone(engine, monkeypatch):
    requests = [engine.generate(prompt(9), Sampling(1.0, 140), request_id=f"r{i}") for i in range(SLOTS + 2)]
    gate, tasks = await held(engine, monkeypatch, *requests)
    aborts = [asyncio.create_task(engine.abort(name)) for name in ("r1", f"r{SLOTS}", "r", "unknown")]
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(*aborts)
    finishes = [(c.finish, len(c.token_ids)) for c in await asyncio.gather(*tasks)]
    expected = [("length", 140)] * (SLOTS + 2)
    expected[1], expected[SLOTS] = ("abort", sampled_in_a_run(9)), ("abort", 0)
    assert finishes == expected


async def test_requests_can_be_aborted_and_cancelled_while_paused(engine, monkeypatch):
    requests = [engine.generate(prompt(9), Sampling(1.0, 140), request_id=f"r{i}") for i in range(SLOTS + 4)]
    gate, tasks = await held(engine, monkeypatch, *requests)
    await after_the_gate(gate, engine.pause("in_place"))
    for name in ("r0", f"r{SLOTS}"):
        await engine.abort(name)
    assert [len((await tasks[i]).token_ids) for i in (0, SLOTS)] == [sampled_in_a_run(9), 0]
    assert not await engine.flush_cache()
    left = [task for task in tasks if not task.done()]
    for task in left[:-1]:
        task.cancel()
    await asyncio.gather(*left[:-1], return_exceptions=True)
    assert await engine.flush_cache(), "the cancelled requests no longer hold their slots"
    await engine.resume()
    assert len((await left[-1]).token_ids) == 140
    assert engine.statistics.sampled == SLOTS * sampled_in_a_run(9) + 140


async def test_a_flushed_prefix_is_not_used_again(engine):
    for cached in (0, 40 // CHUNK * CHUNK):
        completion = await engine.generate(prompt(40), Sampling(1.0, 4))
        assert completion.cached_tokens == cached
    assert await engine.flush_cache()
    assert (await engine.generate(prompt(40), Sampling(1.0, 4))).cached_tokens == 0


async def test_the_cache_stays_while_requests_need_it(engine, monkeypatch):
    expected = await engine.generate(prompt(20), Sampling(1.0, 130, seed=2))
    gate, (running,) = await held(engine, monkeypatch, engine.generate(prompt(20), Sampling(1.0, 130, seed=2)))
    assert not await after_the_gate(gate, engine.flush_cache())
    assert await running == expected


async def test_a_paused_engine_can_be_closed(engine):
    await engine.pause("retract")
    waiting = asyncio.create_task(engine.generate(prompt(5), Sampling(1.0, 4)))
    await two_turns_of_the_thread(engine)
    await asyncio.to_thread(engine.close)
    with pytest.raises(asyncio.CancelledError):
        await waiting
