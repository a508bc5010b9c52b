"""What every server that a policy may ask must do: SGLang itself, and the embedded engine behind the same API."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.sglang import SGLangError, SGLangPolicy
from tests.servers import (
    CONFIG,
    CONTEXT,
    ENDS,
    EOS,
    KEY,
    TOKENIZER,
    TOLERANCE,
    Server,
    assert_sampled_by,
    forward,
    logits,
    prompt,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Nature:
    """Where the two differ by nature."""

    seed_fixes_draws: bool  # SGLang's attention on a CPU samples without the seed
    keeps_old_keys: bool  # over an update without a flush; the embedded engine makes all that was cached anew
    gives_memory_back: bool  # the embedded engine has no such routes; on a CPU SGLang only drops its cache
    unknown_field: int  # status for a field of a request that does not exist: SGLang ignores it
    beyond_the_context: int  # status for more new tokens than the context has room for: the embedded engine ends there


NATURES = {
    "sglang": Nature(
        seed_fixes_draws=False, keeps_old_keys=True, gives_memory_back=True, unknown_field=200, beyond_the_context=400
    ),
    "embedded": Nature(
        seed_fixes_draws=True, keeps_old_keys=False, gives_memory_back=False, unknown_field=400, beyond_the_context=200
    ),
}


@pytest.fixture(scope="module", params=["sglang", "embedded"])
def server(request) -> Server:
    return request.getfixturevalue({"sglang": "real_server", "embedded": "embedded_server"}[request.param])


@pytest.fixture
def nature(server) -> Nature:
    return NATURES[server.name]


@pytest.fixture
async def policy(server) -> AsyncIterator[SGLangPolicy]:
    """Asks a server that has new versions of the first model's weights, and nothing cached."""
    async with SGLangPolicy(server.url, api_key=KEY, vocab_size=CONFIG.vocab_size, backoff=0.05) as policy:
        await policy.update_weights(server.next_version(), server.models[0])
        yield policy


@pytest.fixture
async def ask(server, policy) -> AsyncIterator[Callable[..., Any]]:
    async with server.asks() as ask:
        yield ask


def as_request(ids: tuple[int, ...], new: int, **more: Any) -> dict[str, Any]:
    """A greedy request for `new` tokens."""
    parameters = {"temperature": 0, "max_new_tokens": new} | more.pop("sampling_params", {})
    return {"input_ids": list(ids), "sampling_params": parameters, "return_logprob": True} | more


async def begin(ask: Callable[..., Any], *requests: dict[str, Any]) -> list[asyncio.Task[Any]]:
    """The requests, each in the middle of its answer: a shorter one that was sent with them is finished."""
    tasks = [asyncio.create_task(ask("/generate", **request)) for request in requests]
    await ask("/generate", **as_request(prompt(20, seed=99), 80))
    return tasks


def errors(answer: dict[str, Any], ids: tuple[int, ...], model: int) -> np.ndarray:
    """How far the log-probability of each token of an answer is from that of a float32 forward pass of the model."""
    got = [row[0] for row in answer["meta_info"]["output_token_logprobs"]]
    return np.abs(forward(model, (*ids, *answer["output_ids"]))[len(ids) - 1 :] - got)


# --- what is sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_logprobs_are_those_of_a_float32_forward_at_the_temperature(policy, temperature):
    prompts = [prompt(length, seed=length) for length in (1, 5, 16, 17, 64, 200)]
    samplings = [Sampling(temperature, 40, seed=len(ids)) for ids in prompts]
    sampled = await asyncio.gather(*map(policy.generate, prompts, samplings))
    for ids, completion in zip(prompts, sampled, strict=True):
        assert (len(completion.token_ids), completion.finish) == (40, "length")
        assert_sampled_by(0, ids, completion, temperature)
        if temperature == 0:
            greedy = logits(0, ids + completion.token_ids)[len(ids) - 1 :].argmax(-1)
            assert completion.token_ids == tuple(greedy)


async def test_a_seed_fixes_the_draws_where_the_server_says_so(policy, nature):
    first, again = [await policy.generate(prompt(20), Sampling(1.0, 40, seed=3)) for _ in range(2)]
    assert (first == again) == nature.seed_fixes_draws


async def test_a_cached_prefix_changes_no_logprob(ask):
    ids = prompt(300)
    for given, is_cached in ((ids, False), (ids, True), (ids[:200], True)):
        _, answer = await ask("/generate", **as_request(given, 30))
        assert (answer["meta_info"]["cached_tokens"] > 100) == is_cached
        assert errors(answer, given, 0).max() < TOLERANCE


async def test_top_p_bounds_what_is_sampled_and_renormalises_no_logprob(policy):
    ids, top_p = prompt(30), 0.3
    for completion in await asyncio.gather(*(policy.generate(ids, Sampling(1.0, 25, top_p=top_p)) for _ in range(4))):
        assert_sampled_by(0, ids, completion)
        scores = logits(0, ids + completion.token_ids)[len(ids) - 1 :]
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        for chance, token in zip(chances, completion.token_ids, strict=True):
            assert chance[chance > chance[token]].sum() < top_p + TOLERANCE


async def test_stop_strings_end_a_completion_across_tokens_and_are_kept_whole(policy, ask):
    ids = prompt(30)
    free = (await policy.generate(ids, Sampling(0.0, 60))).token_ids
    for first, last in ((9, 11), (20, 23), (40, 41)):
        text = TOKENIZER.decode(free[first:last])
        stop = text[1:-1] if len(text) > 4 else text
        end = next(n for n in range(61) if stop in TOKENIZER.decode(free[:n]))
        completion = await policy.generate(ids, Sampling(0.0, 60, ("never said", stop)))
        assert (completion.token_ids, completion.finish) == (free[:end], "stop")
        assert_sampled_by(0, ids, completion)
        kept = {"stop": ["never said", stop], "no_stop_trim": True, "skip_special_tokens": False}
        _, answer = await ask("/generate", **as_request(ids, 60, sampling_params=kept))
        assert stop in answer["text"]
        assert TOKENIZER.decode(free[:end]).startswith(answer["text"])  # SGLang's text ends where the stop string does
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


async def test_the_end_of_sequence_ends_a_completion_and_is_kept(server, policy):
    await policy.update_weights(server.next_version(), server.models[ENDS])
    prompts = [prompt(10, seed) for seed in range(16)]
    sampled = await asyncio.gather(*(policy.generate(ids, Sampling(1.0, 400, seed=len(ids))) for ids in prompts))
    ended = [completion for completion in sampled if completion.finish == "stop"]
    assert ended
    for ids, completion in zip(prompts, sampled, strict=True):
        assert EOS not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == EOS) == (completion.finish == "stop")
        assert_sampled_by(ENDS, ids, completion)


async def test_requests_side_by_side_with_shared_prefixes_are_answered_as_one_by_one(policy):
    shared = prompt(150)
    prompts = [shared[: 10 * (i % 12)] + prompt(10 + i, seed=i) for i in range(32)]
    alone = [await policy.generate(ids, Sampling(0.0, 20)) for ids in prompts]
    together = await asyncio.gather(*(policy.generate(ids, Sampling(0.0, 20)) for ids in prompts))
    for first, second in zip(alone, together, strict=True):
        assert first.token_ids == second.token_ids
        np.testing.assert_allclose(first.logprobs, second.logprobs, rtol=0, atol=TOLERANCE)


async def test_scores_are_the_logprobs_of_given_tokens_also_after_a_cached_prefix(server, policy):
    ids = prompt(300)
    await policy.generate(ids[:200], Sampling(0.0, 5))
    for length in (1, 2, 100, 300):
        scores = await policy.score(ids[:length])
        assert scores.weight_version == server.version
        np.testing.assert_allclose(scores.logprobs, forward(0, ids[:length]), rtol=0, atol=TOLERANCE)


# --- aborting ------------------------------------------------------------------------------------------


async def wait_until_idle(ask: Callable[..., Any]) -> None:
    """The prefix cache can be flushed only when nothing runs."""
    while (await ask("/flush_cache"))[0] != 200:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def test_an_aborted_request_answers_with_what_it_had_and_others_go_on(ask):
    tasks = await begin(ask, *(as_request(prompt(20, seed), 1000, rid=f"r{seed}") for seed in range(3)))
    assert (await ask("/abort_request", rid="r1"))[0] == 200
    metas = [answer["meta_info"] for _, answer in await asyncio.gather(*tasks)]
    assert [meta["id"] for meta in metas] == ["r0", "r1", "r2"]
    assert [meta["finish_reason"]["type"] for meta in metas] == ["length", "abort", "length"]
    assert 0 < metas[1]["completion_tokens"] == len(metas[1]["output_token_logprobs"]) < 1000


async def test_all_requests_are_aborted_at_once(ask):
    tasks = await begin(ask, *(as_request(prompt(20, seed), 1900) for seed in range(3)))
    assert (await ask("/abort_request", abort_all=True))[0] == 200
    for status, answer in await asyncio.gather(*tasks):
        assert (status, answer["meta_info"]["finish_reason"]["type"]) == (200, "abort")


async def test_a_cancelled_task_ends_its_request_on_the_server(policy, ask):
    request = asyncio.create_task(policy.generate(prompt(20), Sampling(0.0, 2000)))
    await begin(ask)
    began = time.monotonic()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await wait_until_idle(ask)
    cancelled = time.monotonic() - began
    began = time.monotonic()
    await policy.generate(prompt(20), Sampling(0.0, 2000))
    assert cancelled < (time.monotonic() - began) / 2


# --- new weights ---------------------------------------------------------------------------------------


async def test_after_an_update_nothing_of_the_old_weights_is_left_in_the_cache(server, policy, ask):
    """Cached keys and values of old weights would show in the log-probabilities of what follows them."""
    ids = prompt(300)
    before = await policy.generate(ids, Sampling(0.0, 40))
    assert_sampled_by(0, ids, before)
    version = server.next_version()
    await policy.update_weights(version, server.models[1])
    info = await policy.model_info()
    assert (info["weight_version"], info["model_path"]) == (str(version), str(server.models[1]))
    for shared in (ids, ids + before.token_ids, ids[:150]):
        after = await policy.generate(shared, Sampling(0.0, 40))
        assert after.weight_versions == (version,) * 40
        assert_sampled_by(1, shared, after)
        scores = await policy.score(shared)
        assert scores.weight_version == version
        np.testing.assert_allclose(scores.logprobs, forward(1, shared), rtol=0, atol=TOLERANCE)


async def test_a_folder_without_weights_is_refused_and_the_old_ones_stay(server, policy, tmp_path):
    before = await policy.generate(prompt(30), Sampling(0.0, 20))
    with pytest.raises(SGLangError, match="400"):
        await policy.update_weights(server.next_version(), tmp_path / "nowhere")
    after = await policy.generate(prompt(30), Sampling(0.0, 20))
    assert (after.token_ids, after.weight_versions) == (before.token_ids, before.weight_versions)
    assert_sampled_by(0, prompt(30), after)


async def paused_in_the_middle(ask: Callable[..., Any], mode: str, folder: Path, version: int) -> list[Any]:
    """Answers to two long requests that were paused in their middle, an update in between, and to one that came while
    the server was paused."""
    tasks = await begin(ask, *(as_request(prompt(50, seed), 1200) for seed in range(2)))
    assert (await ask("/pause_generation", mode=mode))[0] == 200
    tasks.append(asyncio.create_task(ask("/generate", **as_request(prompt(60, seed=5), 10))))
    # In place, what is cached of requests that stay cannot be flushed; a server need not take the update as whole then.
    body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": mode != "in_place"}
    assert (await ask("/update_weights_from_disk", **body))[0] == 200
    assert not tasks[-1].done()
    if mode != "in_place":
        assert (await ask("/flush_cache"))[0] == 200
    assert (await ask("/continue_generation"))[0] == 200
    return [answer for _, answer in await asyncio.gather(*tasks)]


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
async def test_a_pause_with_an_update_leaves_spans_of_both_versions(server, policy, ask, nature, mode):
    old, new = server.version, server.next_version()
    *long, late = await paused_in_the_middle(ask, mode, server.models[1], new)
    assert late["meta_info"]["weight_versions"] == [{"version": str(new), "start": 0, "end": 10}]
    for seed, answer in enumerate(long):
        ids, meta = prompt(50, seed), answer["meta_info"]
        count = meta["completion_tokens"]
        first, *rest = meta["weight_versions"]
        assert (first["version"], first["start"]) == (str(old), 0)
        if mode == "abort":
            assert (meta["finish_reason"]["type"], rest, first["end"]) == ("abort", [], count)
            spans = [(0, 0, count)]
        else:
            assert rest == [{"version": str(new), "start": first["end"], "end": 1200}]
            spans = [(0, 0, first["end"]), (1, first["end"], 1200)]
        assert 0 < first["end"] < 1200
        for model, start, end in spans:
            error = errors(answer, ids, model)[start:end].max()
            assert (error < TOLERANCE) != (model == 1 and mode == "in_place" and nature.keeps_old_keys)


async def test_a_flush_is_what_removes_the_keys_of_old_weights(server, ask, nature):
    """Without one, the prefix of an earlier request is served from them."""
    ids = prompt(300)
    await ask("/generate", **as_request(ids, 10))
    body = {"model_path": str(server.models[1]), "weight_version": str(server.next_version()), "flush_cache": False}
    assert (await ask("/update_weights_from_disk", **body))[0] == 200
    for flushed in (False, True):
        if flushed:
            assert (await ask("/flush_cache"))[0] == 200
        _, answer = await ask("/generate", **as_request(ids, 10))
        assert (errors(answer, ids, 1).max() < TOLERANCE) == (flushed or not nature.keeps_old_keys)


async def test_a_server_gives_its_memory_back_and_serves_new_weights_after_it_took_it_again(server, policy, nature):
    if not nature.gives_memory_back:
        with pytest.raises(SGLangError, match="404"):
            await policy.release_memory()
        return
    ids = prompt(100)
    running = asyncio.create_task(policy.generate(ids, Sampling(1.0, 1500)))
    await asyncio.sleep(0.3)
    await policy.release_memory()  # ends what runs, or SGLang would end itself
    assert (await running).finish == "abort"
    await policy.resume_memory()
    await policy.update_weights(server.next_version(), server.models[1])
    assert_sampled_by(1, ids, await policy.generate(ids, Sampling(0.0, 30)))


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {},
        as_request((), 1),
        as_request((1,) * CONTEXT, 1),
        as_request((1,), -1),
        as_request((1,), 1, sampling_params={"temprature": 1.0}),
        as_request((1,), 1, sampling_params={"temperature": -1.0}),
        as_request((1,), 1, sampling_params={"top_p": 1.5}),
        {"input_ids": "ids"},
    ],
    ids=lambda body: str(body)[:60],
)
async def test_what_cannot_be_answered_is_a_400_that_says_why(ask, body):
    status, answer = await ask("/generate", **body)
    assert status == 400
    assert "message" in str(answer) or "error" in answer
    assert (await ask("/generate", **as_request((1,), 3)))[0] == 200


async def test_what_one_refuses_and_the_other_does_not(ask, nature):
    assert (await ask("/generate", **as_request((1,), 3, no_such_field=1)))[0] == nature.unknown_field
    assert (await ask("/generate", **as_request((1,) * (CONTEXT - 10), 15)))[0] == nature.beyond_the_context


async def test_a_request_id_in_flight_is_not_taken_twice(ask):
    [first] = await begin(ask, as_request(prompt(20), 1000, rid="same"))
    assert (await ask("/generate", **as_request(prompt(20), 3, rid="same")))[0] == 400
    assert (await first)[1]["meta_info"]["completion_tokens"] == 1000


async def test_a_wrong_api_key_is_refused(server):
    async with SGLangPolicy(server.url, api_key="wrong") as policy:
        with pytest.raises(SGLangError, match="401"):
            await policy.generate((1, 2), Sampling(0.0, 1))
        with pytest.raises(SGLangError, match="401"):
            await policy.update_weights(1, server.models[0])


async def test_an_id_outside_the_vocabulary_never_leaves_the_client(policy):
    """It would kill SGLang."""
    for ids in ((1, CONFIG.vocab_size), (-1, 1)):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await policy.generate(ids, Sampling(0.0, 1))
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await policy.score(ids)
    assert len((await policy.generate((1, 2), Sampling(0.0, 3))).token_ids) == 3


async def test_a_context_that_is_full_ends_with_length(server):
    async with SGLangPolicy(server.url, api_key=KEY, vocab_size=CONFIG.vocab_size, context=CONTEXT) as policy:
        ids = prompt(CONTEXT)
        assert await policy.generate(ids, Sampling(0.0, 5)) == Completion((), (), "length", ())
        cut = await policy.generate(ids[:-20], Sampling(0.0, 50))
        assert (0 < len(cut.token_ids) <= 20, cut.finish) == (True, "length")
