"""What the HTTP client makes of the answers, the errors and the silence of other servers."""

import socket
import subprocess
import sys

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from etagent_jax.policy.interface import Completion, Sampling, Scores
from etagent_jax.policy.sglang import TRIES, SGLangError, SGLangPolicy, Statistics
from tests.test_serving import running


def stub(*answers: Response, path: str = "/generate") -> tuple[Starlette, list[dict]]:
    """A server that gives `answers` in turn, the last one again and again, and the bodies it was sent."""
    bodies: list[dict] = []

    async def answer(request: Request) -> Response:
        bodies.append(await request.json())
        return answers[min(len(bodies), len(answers)) - 1]

    async def health(request: Request) -> Response:
        return Response()

    return Starlette(routes=[Route(path, answer, methods=["POST"]), Route("/health", health)]), bodies


def sglang_answer(**meta) -> JSONResponse:
    return JSONResponse({"text": "", "output_ids": [], "meta_info": {"id": "r", "prompt_tokens": 1} | meta})


async def test_answers_are_read_as_sglang_means_them():
    rows = [[-0.5, 7, None], [-1.0, 8, "x"], [-2.0, 9, None]]
    usual = sglang_answer(
        completion_tokens=2,
        output_token_logprobs=rows,
        weight_version="default",
        finish_reason={"type": "stop"},
        cached_tokens=1,
    )
    spans = [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 3}]
    across = sglang_answer(
        completion_tokens=3, output_token_logprobs=rows, weight_version="5", weight_versions=spans,
        finish_reason={"type": "length", "length": 3},
    )  # fmt: skip
    aborted = sglang_answer(completion_tokens=0, output_token_logprobs=[], finish_reason={"type": "abort"})
    app, bodies = stub(usual, across, aborted, usual)  # what another client has aborted is asked for again
    with running(app) as url:
        async with SGLangPolicy(url, backoff=0.001) as policy:
            got = [await policy.generate((1, 2), Sampling(0.7, 9, ("</a>",), 0.9, seed=5), "s") for _ in range(3)]
    assert got == [
        Completion((8, 9), (-1.0, -2.0), "stop", (0, 0)),  # the last two rows
        Completion((7, 8, 9), (-0.5, -1.0, -2.0), "length", (4, 5, 5)),
        Completion((8, 9), (-1.0, -2.0), "stop", (0, 0)),
    ]
    expected = {
        "temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_new_tokens": 9, "stop": ["</a>"], "sampling_seed": 5,
        "no_stop_trim": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    assert [completion.cached_tokens for completion in got] == [1, 0, 1]
    assert len({body.pop("rid") for body in bodies}) == 4
    assert bodies == [{"input_ids": [1, 2], "return_logprob": True, "sampling_params": expected}] * 4


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
        async with SGLangPolicy(url, vocab_size=10, backoff=0.001) as policy:
            assert await policy.score((4, 5, 6)) == Scores((-0.5, -1.0), 3)
            assert await policy.score((4, 5, 6)) == Scores((-0.5, -1.0), 0)
            with pytest.raises(SGLangError, match=rf"{url}/generate did not answer as SGLang does .*'input_token_logp"):
                await policy.score((4, 5, 6))
            with pytest.raises(ValueError, match="outside the vocabulary of 10"):
                await policy.score((4, 10))
    assert len(bodies) == 2 + TRIES
    assert bodies[0] == {
        "input_ids": [4, 5, 6], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True,
        "logprob_start_len": 0, "rid": bodies[0]["rid"],
    }  # fmt: skip


ROW = [-1.0, 7, None]
STOP = {"type": "stop"}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Response("busy"), "did not answer with JSON: 'busy'"),
        (Response('{"text": "", "meta_info": {"id'), "did not answer with JSON"),
        (JSONResponse([1]), "did not answer with a JSON object"),
        (JSONResponse({"text": "a"}), "'meta_info'"),
        (sglang_answer(completion_tokens=1, finish_reason=STOP), "'output_token_logprobs'"),
        (sglang_answer(completion_tokens=1, finish_reason=STOP, output_token_logprobs=None), "NoneType"),
        (sglang_answer(completion_tokens=1, finish_reason=STOP, output_token_logprobs=[[None, 7, None]]), "NoneType"),
        (sglang_answer(completion_tokens=1, finish_reason=STOP, output_token_logprobs=[["nan", 7, None]]), "finite"),
        (sglang_answer(completion_tokens=2, finish_reason=STOP, output_token_logprobs=[ROW]), "as many of each"),
        (sglang_answer(completion_tokens=0, finish_reason=STOP, weight_versions=3), "not iterable"),
        (sglang_answer(completion_tokens=1, finish_reason={"type": "odd"}, output_token_logprobs=[ROW]), "'odd'"),
        (
            sglang_answer(completion_tokens=1, finish_reason=STOP, output_token_logprobs=[ROW], weight_version="final"),
            "'final' is not a number",
        ),
    ],
)
async def test_answers_that_make_no_sense_are_asked_for_again_and_then_name_the_server(answer, says):
    app, bodies = stub(answer)
    with running(app) as url:
        async with SGLangPolicy(url, backoff=0.001) as policy:
            with pytest.raises(SGLangError, match=f"{url}/generate .*{says}.*{TRIES} tries"):
                await policy.generate((1,), Sampling(1.0, 4))
            assert policy.statistics == Statistics(retries=TRIES - 1)
    assert len(bodies) == TRIES
    good = sglang_answer(completion_tokens=1, output_token_logprobs=[ROW], finish_reason=STOP)
    app, bodies = stub(answer, answer, good)
    with running(app) as url:
        async with SGLangPolicy(url, backoff=0.001) as policy:
            assert (await policy.generate((1,), Sampling(1.0, 4))).token_ids == (7,)
    assert len(bodies) == 3


async def test_5xx_is_tried_again_and_4xx_is_not():
    good = sglang_answer(completion_tokens=1, output_token_logprobs=[ROW], finish_reason={"type": "length"})
    ill = JSONResponse({"error": {"message": "out of memory"}}, 500)
    loading = JSONResponse({"error": {"message": "loading"}}, 503)
    for answers, tries, says in (
        ([ill, ill, good], 3, None),
        ([loading] * (TRIES + 2) + [good], TRIES + 3, None),
        ([ill], TRIES, f"HTTP 500: out of memory .{TRIES} tries"),
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
        assert len({body["rid"] for body in bodies}) == tries


async def test_an_unknown_id_never_leaves_the_client():
    app, bodies = stub(Response("{}"))
    with running(app) as url:
        async with SGLangPolicy(url, vocab_size=100) as policy:
            for ids in ((1, 100), (-1,), ()):
                with pytest.raises(ValueError, match=r"outside the vocabulary of 100|no tokens given"):
                    await policy.generate(ids, Sampling(1.0, 4))
    assert bodies == []


async def test_servers_that_are_silent_for_too_long_are_named_with_what_they_said_last():
    with socket.socket() as closed, socket.socket() as silent:
        for each in (closed, silent):
            each.bind(("127.0.0.1", 0))
        silent.listen()
        nowhere, mute = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in (closed, silent))
        async with SGLangPolicy([nowhere, mute], timeout=0.05, patience=0.6, backoff=0.001) as policy:
            says = (
                rf"within 0\.6 s: {nowhere} .*cannot be reached .*; {mute} .*did not answer within 0\.05 s.*start them"
            )
            with pytest.raises(SGLangError, match=says):
                await policy.generate((1,), Sampling(1.0, 4))


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("localhost:30000", "'localhost:30000'.*must start with http"),
        ([], "at least one"),
        (["http://a:1", "http://a:1/"], "http://a:1, http://a:1.*each once"),
    ],
)
def test_urls_that_cannot_be_right_are_refused(urls, says):
    with pytest.raises(ValueError, match=says):
        SGLangPolicy(urls)


def test_the_client_needs_no_jax():
    script = "import sys, etagent_jax.policy.sglang; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
