"""What the HTTP client makes of the answers, the errors and the silence of other servers."""

import socket

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from etagent_jax.policy.interface import Completion, Sampling, Scores
from etagent_jax.policy.sglang import TRIES, SGLangError, SGLangPolicy
from tests.test_serving import running


def stub(*answers: Response, path: str = "/generate") -> tuple[Starlette, list[dict]]:
    """A server that gives `answers` in turn, the last one again and again, and the bodies it was sent."""
    bodies: list[dict] = []

    async def answer(request: Request) -> Response:
        bodies.append(await request.json())
        return answers[min(len(bodies), len(answers)) - 1]

    return Starlette(routes=[Route(path, answer, methods=["POST"])]), bodies


def sglang_answer(**meta) -> JSONResponse:
    return JSONResponse({"text": "", "output_ids": [], "meta_info": {"id": "r", "prompt_tokens": 1} | meta})


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


async def test_scores_are_read_from_the_input_logprobs():
    rows = [[None, 4, None], [-0.5, 5, "x"], [-1, 6, None]]
    meta = {"completion_tokens": 1, "output_token_logprobs": [[-3.0, 7, None]], "finish_reason": {"type": "length"}}
    answers = [
        sglang_answer(input_token_logprobs=rows, weight_version="3", **meta),
        sglang_answer(input_token_logprobs=rows, **meta),
        sglang_answer(input_token_logprobs=rows[:2], **meta),
        sglang_answer(**meta),
    ]
    app, bodies = stub(*answers)
    with running(app) as url:
        async with SGLangPolicy(url, vocab_size=10) as policy:
            assert await policy.score((4, 5, 6)) == Scores((-0.5, -1.0), 3)
            assert await policy.score((4, 5, 6)) == Scores((-0.5, -1.0), 0)
            for says in ("2 input_token_logprobs for 3 tokens", "input_token_logprobs"):
                with pytest.raises(SGLangError, match=rf"{url}/generate did not answer as SGLang does .*{says}"):
                    await policy.score((4, 5, 6))
            with pytest.raises(ValueError, match="outside the vocabulary of 10"):
                await policy.score((4, 10))
    assert len(bodies) == 4
    assert bodies[0] == {
        "input_ids": [4, 5, 6], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True,
        "logprob_start_len": 0,
    }  # fmt: skip


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


async def test_5xx_is_tried_again_and_4xx_is_not():
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


async def test_an_unreachable_server_and_a_slow_one_are_named():
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
    with pytest.raises(ValueError, match="must start with http"):
        SGLangPolicy("localhost:30000")
