"""Real SGLang servers that die, that are slow to reach, and that serve something else."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from etagent_jax.model import weights
from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.sglang import SGLangError, SGLangPolicy
from tests import servers
from tests.families import random_params
from tests.servers import CONFIG, KEY, TOKENIZER, Server, assert_sampled_by, prompt

pytestmark = pytest.mark.slow
ROLLOUTS, TURNS, NEW = 8, 6, 40

Turn = tuple[tuple[int, ...], Completion]
"""What was given, and what followed."""


@pytest.fixture(scope="module")
def mortal_server(models, tmp_path_factory) -> Iterator[Server]:
    """One that a test may kill; its launcher starts it again, with the weights of the first model."""
    with servers.sglang(models, tmp_path_factory.mktemp("mortal")) as server:
        yield server


def make_policy(*urls: str, **options: Any) -> SGLangPolicy:
    return SGLangPolicy(urls, api_key=KEY, vocab_size=CONFIG.vocab_size, **{"backoff": 0.1, **options})


async def rollout(policy: SGLangPolicy, number: int, finished: list[Turn]) -> list[Turn]:
    """A trajectory of several turns, each of which goes on from all that was before it."""
    ids, turns = prompt(30, seed=number), []
    for turn in range(TURNS):
        completion = await policy.generate(ids, Sampling(1.0, NEW, seed=number), f"rollout/{number}")
        turns.append((ids, completion))
        finished.append(turns[-1])
        ids = ids + completion.token_ids + prompt(5, seed=turn)
    return turns


async def rollouts_while(policy: SGLangPolicy, happens: asyncio.Event, after: int) -> list[list[Turn]]:
    """All rollouts; `happens` is set in their midst, when so many turns are finished."""
    finished: list[Turn] = []
    tasks = [asyncio.create_task(rollout(policy, number, finished)) for number in range(ROLLOUTS)]
    while len(finished) < after:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    happens.set()
    done = await asyncio.gather(*tasks)
    assert len(finished) == ROLLOUTS * TURNS
    return done


def assert_whole(rollouts: Sequence[Sequence[Turn]], model: int, version: int) -> None:
    """No turn is missing, and all tokens were sampled by that model under that version."""
    assert [len(turns) for turns in rollouts] == [TURNS] * ROLLOUTS
    for turns in rollouts:
        for ids, completion in turns:
            assert completion.weight_versions == (version,) * NEW
            assert_sampled_by(model, ids, completion)


async def kill(server: Server, when: asyncio.Event) -> None:
    await when.wait()
    os.kill(server.process(), signal.SIGKILL)


async def test_the_only_server_dies_and_comes_back_with_old_weights(mortal_server):
    """Its launcher starts it with the weights that it was launched with; nothing is sampled by those."""
    version, happens = mortal_server.next_version(), asyncio.Event()
    async with make_policy(mortal_server.url) as policy:
        await policy.update_weights(version, mortal_server.models[1])
        killing = asyncio.create_task(kill(mortal_server, happens))
        done = await rollouts_while(policy, happens, after=ROLLOUTS)
        await killing
        assert mortal_server.starts() == 2
        assert policy.statistics.brought_up_to_date == 1
        assert policy.statistics.retries > 0
    assert_whole(done, 1, version)


async def test_one_of_two_servers_dies_and_the_other_takes_its_rollouts(real_server, mortal_server):
    version, happens = real_server.version + mortal_server.version + 1, asyncio.Event()
    real_server.version = mortal_server.version = version
    async with make_policy(real_server.url, mortal_server.url) as policy:
        await policy.update_weights(version, real_server.models[1])
        killing = asyncio.create_task(kill(mortal_server, happens))
        done = await rollouts_while(policy, happens, after=ROLLOUTS)
        await killing
        assert policy.statistics.retries > 0
    assert_whole(done, 1, version)


async def test_a_slow_network_that_breaks_connections_loses_and_changes_nothing(real_server):
    version = real_server.next_version()
    async with (
        servers.bad_network(real_server.url, seconds=0.05, drop_every=4) as (url, dropped),
        make_policy(real_server.url) as near,
        make_policy(url) as far,
    ):
        await near.update_weights(version, real_server.models[1])
        far.expect(version, real_server.models[1])
        done = await rollouts_while(far, asyncio.Event(), after=0)
        assert dropped() > 0
        assert far.statistics.retries >= dropped()
    assert_whole(done, 1, version)


async def test_a_server_of_another_model_is_refused_with_both_names(real_server, tmp_path):
    served, other = real_server.models[0], tmp_path / "other"
    config = dataclasses.replace(CONFIG, family="llama")
    weights.save(random_params(config), config, other, eos_ids=(1,), pad_id=0)
    TOKENIZER.save(other)
    async with make_policy(real_server.url) as policy:
        await policy.update_weights(real_server.next_version(), served)
        await policy.check(TOKENIZER, served)
        with pytest.raises(SGLangError) as refused:
            await policy.check(TOKENIZER, other)
    assert str(other) in str(refused.value)
    assert served.name in str(refused.value)


async def test_a_server_that_is_not_there_is_named(tmp_path: Path):
    url = f"http://127.0.0.1:{servers.free_port()}"
    async with make_policy(url, patience=0.5) as policy:
        with pytest.raises(SGLangError, match=url):
            await policy.generate((1, 2), Sampling(0.0, 1))
        with pytest.raises(SGLangError, match=url):
            await policy.wait_until_ready(0.5, say=lambda _: None)
