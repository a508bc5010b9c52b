"""The embedded engine over HTTP, as SGLang serves a model: the app behind `etagent_jax.serve`."""

import asyncio
import dataclasses
import hmac
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar, get_args
from urllib.parse import unquote

from flax import nnx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from etagent_jax import __version__
from etagent_jax.model import weights
from etagent_jax.model.folder import ARCHITECTURES, read_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.engine import Engine, EngineStopped, PauseMode
from etagent_jax.policy.interface import Completion, Scores
from etagent_jax.policy.requests import GenerateRequest, Refused, read_request, refuse_unknown
from etagent_jax.policy.sglang import SESSION_HEADER
from etagent_jax.tokenizer import Tokenizer

BODY_BYTES_PER_TOKEN, BODY_BYTES = 16, 1 << 20
HEALTH_SECONDS = 20.0
VERSION_DIGITS = 18
CLIENT_CLOSED_REQUEST = 499

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    engine: Engine, tokenizer: Tokenizer, model_path: str, api_key: str | None = None, *,
    max_queued: int = 2048, body_seconds: float = 60.0,
) -> Starlette:  # fmt: skip
    """SGLang's routes for generating, aborting, pausing, new weights, and what is served.

    One prompt a request, not streamed; answers are shaped like SGLang's.  With `return_logprob`,
    `input_token_logprobs` are those from `logprob_start_len` on (default: none), the first of them
    null; with `max_new_tokens` 0 nothing is sampled.  A request whose client goes away frees its
    slot.  Scores and new weights are taken while generation is paused.

    api_key: all but `/health` and `/health_generate` ask for `Authorization: Bearer <key>`.
    max_queued: most requests beyond those that have a slot; further ones are answered 503.
    body_seconds: until a request's body has arrived.
    """
    served = {"model_path": model_path}
    version_names = {engine.version: "default"}  # the weights of the launch have no number
    in_flight: set[str] = set()
    updating = asyncio.Lock()  # one set of new weights in memory at a time

    def version_name(number: int) -> str:
        return version_names.get(number, str(number))

    async def read_body(request: Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout(body_seconds):
                return await _json_object(request, BODY_BYTES + BODY_BYTES_PER_TOKEN * engine.context)
        except TimeoutError as error:
            raise Refused(f"the body did not arrive within {body_seconds:g} s", 408) from error

    async def health(request: Request) -> Response:
        return Response(status_code=503 if engine.closed else 200)

    async def health_generate(request: Request) -> Response:
        """A score is answered although all slots are taken, or generation is paused."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await engine.score((0, 0))
        except TimeoutError:
            return Response(status_code=503)
        return Response()

    async def model_info(request: Request) -> Response:
        architecture = next(name for name, family in ARCHITECTURES.items() if family == engine.config.family)
        return _json(
            {
                **served, "tokenizer_path": model_path, "is_generation": True, "model_type": engine.config.family,
                "architectures": [architecture], "weight_version": version_name(engine.version),
            }
        )  # fmt: skip

    async def server_info(request: Request) -> Response:
        return _json(
            {
                **served, "tokenizer_path": model_path, "version": __version__,
                "context_length": engine.context, "max_req_input_len": engine.context,
                "max_running_requests": engine.slots, "max_queued_requests": max_queued,
            }
        )  # fmt: skip

    async def generate(request: Request) -> Response:
        asked = read_request(await read_body(request), tokenizer)
        if asked.id in in_flight:
            raise Refused(f"Duplicate request ID detected: {asked.id}")
        if len(in_flight) >= engine.slots + max_queued:
            raise Refused("The request queue is full.", 503)
        session = unquote(request.headers.get(SESSION_HEADER, ""))

        async def work() -> tuple[Scores, Completion]:
            scores, completion = Scores((), engine.version), Completion((), (), "length", ())
            if asked.sampling is None or asked.logprob_start < len(asked.ids):
                scores = await engine.score(asked.ids)
            if asked.sampling is not None:
                completion = await engine.generate(asked.ids, asked.sampling, session, asked.id)
            return scores, completion

        in_flight.add(asked.id)
        try:
            done = await _unless_disconnected(request, work())
        except ValueError as error:
            raise Refused(str(error)) from error
        finally:
            in_flight.remove(asked.id)
        if done is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _json(_answer(asked, *done, tokenizer, version_name))

    async def abort_request(request: Request) -> Response:
        body = await read_body(request)
        refuse_unknown("field", body, ("rid", "abort_all"), {})
        rid, everything = body.get("rid"), body.get("abort_all", False)
        if not isinstance(rid, str | None) or not isinstance(everything, bool):
            raise Refused("needs rid, the id of a request, or abort_all, true")
        if everything or rid:
            await engine.abort(None if everything else rid)
        return Response()

    async def pause_generation(request: Request) -> Response:
        body = await read_body(request)
        refuse_unknown("field", body, ("mode",), {})
        mode = body.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise Refused(f"mode must be one of {', '.join(get_args(PauseMode))}, got {mode!r:.50}")
        await engine.pause(mode)
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(request: Request) -> Response:
        refuse_unknown("field", await read_body(request), ("torch_empty_cache",), {})
        await engine.resume()
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(request: Request) -> Response:
        flushed = await engine.flush_cache()
        return Response("Cache flushed.\n" if flushed else "Flush cache failed.\n", 200 if flushed else 400)

    async def update_weights(request: Request) -> Response:
        body = await read_body(request)
        lacking = dict.fromkeys(("abort_all_requests", "is_async", "keep_pause", "recapture_cuda_graph"), (False,))
        known = ("model_path", "weight_version", "flush_cache", "torch_empty_cache", "token_step")
        refuse_unknown("field", body, known, lacking | {"load_format": ("auto",), "manifest": ({},)})
        folder, number = body.get("model_path"), str(body.get("weight_version", ""))
        if not isinstance(folder, str) or not number.isdecimal() or len(number) > VERSION_DIGITS:
            raise Refused(
                f"needs model_path, a folder, and weight_version, a number of at most {VERSION_DIGITS} digits"
            )
        try:
            async with updating:
                _check_same_model(read_config(folder), engine.config, folder)
                await engine.update_weights(int(number), nnx.state(await asyncio.to_thread(weights.load, folder)))
        except (ValueError, OSError) as error:
            return _json({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        served["model_path"] = folder
        version_names.pop(int(number), None)
        message = f"serving {folder} as version {number}"
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    guard = _authorised(api_key)
    post = lambda path, handler: Route(path, guard(handler), methods=["POST"])
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/health_generate", health_generate),
            *(Route(path, guard(model_info)) for path in ("/model_info", "/get_model_info")),
            *(Route(path, guard(server_info)) for path in ("/server_info", "/get_server_info")),
            post("/generate", generate),
            post("/abort_request", abort_request),
            post("/pause_generation", pause_generation),
            post("/continue_generation", continue_generation),
            Route("/flush_cache", guard(flush_cache), methods=["GET", "POST"]),
            post("/update_weights_from_disk", update_weights),
        ],
        exception_handlers={Refused: _refused, EngineStopped: _stopped, ClientDisconnect: _disconnected},
    )


def _authorised(api_key: str | None) -> Callable[[Handler], Handler]:
    """Wraps a handler so that a request without the key is refused; no key, no wrapping."""

    def wrap(handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            given = request.headers.get("Authorization", "").encode("latin-1")  # as headers are decoded
            if api_key and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
                raise Refused("wrong or missing API key; send the header `Authorization: Bearer <key>`", 401)
            return await handler(request)

        return handle

    return wrap


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    answer = _json({"error": {"message": str(error)}}, error.status)
    if error.status == 408:
        answer.headers["Connection"] = "close"  # wait for the rest of the body no longer
    return answer


async def _stopped(request: Request, error: Exception) -> Response:
    return _json({"error": {"message": f"{error}; start the server again"}}, 503)


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """ASCII, so that a client's lone surrogates can be sent back."""
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


async def _json_object(request: Request, limit: int) -> dict[str, Any]:
    """The request's body; Refused if it is longer than `limit` bytes or no JSON object."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise Refused(f"the body is larger than {limit} bytes", 413)
    try:
        body = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_same_model(given: ModelConfig, served: ModelConfig, folder: str) -> None:
    """ValueError if the folder holds another model than the one served; its dtypes may differ."""
    expected = dataclasses.asdict(dataclasses.replace(served, dtype=given.dtype, param_dtype=given.param_dtype))
    for name, value in dataclasses.asdict(given).items():
        if value != expected[name]:
            raise ValueError(f"{folder}: {name} is {value}, the served model's {expected[name]}; start a server for it")


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
    """The result; None, and the work cancelled, if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def _answer(
    asked: GenerateRequest, scores: Scores, completion: Completion, tokenizer: Tokenizer,
    version_name: Callable[[int], str],
) -> dict[str, Any]:  # fmt: skip
    """SGLang's answer to `/generate`; Refused, as 500, if a log-probability is not finite."""
    ids, versions, parameters = completion.token_ids, completion.weight_versions, asked.parameters
    text = tokenizer.decode(ids)
    stops = parameters["stop"] if completion.finish == "stop" else ()
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    finish: dict[str, Any] = {"type": completion.finish}
    if completion.finish == "length":
        finish["length"] = len(ids)
    elif completion.finish == "abort":
        finish["message"] = "Aborted"
    else:
        finish["matched"] = min(ends, key=ends.__getitem__) if ends else ids[-1]
    if parameters["skip_special_tokens"]:
        text = tokenizer.decode([i for i in ids if tokenizer.decode([i]) not in tokenizer.special_tokens])
    if ends and not parameters["no_stop_trim"] and finish["matched"] in text:
        text = text[: text.index(finish["matched"])]
    changes = [i for i, version in enumerate(versions) if i == 0 or versions[i - 1] != version]
    meta = {
        "id": asked.id, "finish_reason": finish, "prompt_tokens": len(asked.ids),
        "completion_tokens": len(ids), "cached_tokens": completion.cached_tokens,
        "weight_version": version_name((scores.weight_version, *versions)[-1]),
        "weight_versions": [
            {"version": version_name(versions[start]), "start": start, "end": end}
            for start, end in zip(changes, [*changes, len(ids)][1:], strict=True)
        ],
    }  # fmt: skip
    if asked.with_logprobs:
        if not all(map(math.isfinite, (*scores.logprobs, *completion.logprobs))):
            weights_served = meta["weight_version"]
            raise Refused(f"the weights of version {weights_served} give log-probabilities that are not finite", 500)
        start = asked.logprob_start
        rows = zip((None, *scores.logprobs[start:]), asked.ids[start:], strict=start < len(asked.ids))
        meta["input_token_logprobs"] = [[x, i, None] for x, i in rows]
        meta["output_token_logprobs"] = [[x, i, None] for x, i in zip(completion.logprobs, ids, strict=True)]
    return {"text": text, "output_ids": list(ids), "meta_info": meta}
