"""The embedded engine over HTTP, as SGLang serves a model: the app behind `etagent_jax.serve`."""

import asyncio
import dataclasses
import hmac
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from flax import nnx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from etagent_jax.model import weights
from etagent_jax.model.folder import read_config
from etagent_jax.model.transformer import ModelConfig
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.interface import Completion, Sampling, Scores
from etagent_jax.policy.sglang import SESSION_HEADER
from etagent_jax.tokenizer import Tokenizer

FIELDS = ("input_ids", "text", "sampling_params", "return_logprob", "logprob_start_len")
SAMPLING_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 128, "stop": None, "sampling_seed": 0,
    "no_stop_trim": False, "skip_special_tokens": True, "spaces_between_special_tokens": True,
}  # fmt: skip
"""The sampling parameters there are, with SGLang's defaults."""

BODY_BYTES_PER_TOKEN, BODY_BYTES = 16, 1 << 20
STOP_CHARACTERS = 256  # each is a row of the stop table, 0.6 MB at a vocabulary of 152,064
MAX_FLOAT = 1e6
CLIENT_CLOSED_REQUEST = 499


T = TypeVar("T")


class BadRequest(Exception):
    """The client's mistake, in one sentence, and the HTTP status for it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def make_app(engine: Engine, tokenizer: Tokenizer, model_path: str, api_key: str | None = None) -> Starlette:
    """`POST /generate`, `POST /update_weights_from_disk`, `GET /get_model_info` and `GET /health`.

    One prompt a request, not streamed; answers are shaped like SGLang's.  With `return_logprob`,
    `input_token_logprobs` are those from `logprob_start_len` on (default: none), the first of them
    null; with `max_new_tokens` 0 nothing is sampled.  A request whose client goes away frees its
    slot.  With an api_key, all but `/health` ask for `Authorization: Bearer <key>`.
    """
    served = {"model_path": model_path}
    body_limit = BODY_BYTES + BODY_BYTES_PER_TOKEN * engine.context

    async def health(request: Request) -> Response:
        return Response(status_code=503 if engine.closed else 200)

    async def model_info(request: Request) -> Response:
        return _json({**served, "is_generation": True, "weight_version": str(engine.version)})

    async def generate(request: Request) -> Response:
        body = await _json_object(request, body_limit)
        asked = _asked(body, tokenizer)
        session = unquote(request.headers.get(SESSION_HEADER, ""))

        async def work() -> tuple[Scores, Completion]:
            scores, completion = Scores((), engine.version), Completion((), (), "length", ())
            if asked.sampling is None or asked.logprob_start < len(asked.ids):
                scores = await engine.score(asked.ids)
            if asked.sampling is not None:
                completion = await engine.generate(asked.ids, asked.sampling, session)
            return scores, completion

        try:
            done = await _unless_disconnected(request, work())
        except ValueError as error:
            raise BadRequest(str(error)) from error
        if done is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _json(_answer(asked, *done, tokenizer))

    async def update_weights(request: Request) -> Response:
        body = await _json_object(request, body_limit)
        folder, version = body.get("model_path"), str(body.get("weight_version", ""))
        if not isinstance(folder, str) or not version.isdecimal():
            raise BadRequest("needs model_path, a folder, and weight_version, a number")
        try:
            _check_same_model(read_config(folder), engine.config, folder)
            await engine.update_weights(int(version), nnx.state(await asyncio.to_thread(weights.load, folder)))
        except (ValueError, OSError) as error:
            return _json({"success": False, "message": str(error)}, 400)
        served["model_path"] = folder
        return _json({"success": True, "message": f"serving {folder} as version {version}"})

    guard = _authorised(api_key)
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/get_model_info", guard(model_info)),
            Route("/generate", guard(generate), methods=["POST"]),
            Route("/update_weights_from_disk", guard(update_weights), methods=["POST"]),
        ],
        exception_handlers={BadRequest: _bad_request},
    )


Handler = Callable[[Request], Awaitable[Response]]


def _authorised(api_key: str | None) -> Callable[[Handler], Handler]:
    """Wraps a handler so that a request without the key is refused; no key, no wrapping."""

    def wrap(handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            given = request.headers.get("Authorization", "")
            if api_key and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
                raise BadRequest("wrong or missing API key; send the header `Authorization: Bearer <key>`", 401)
            return await handler(request)

        return handle

    return wrap


async def _bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return _json({"error": {"message": str(error)}}, error.status)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """ASCII, so that a client's lone surrogates can be sent back."""
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


async def _json_object(request: Request, limit: int) -> dict[str, Any]:
    """The request's body; BadRequest if it is longer than `limit` bytes or no JSON object."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise BadRequest(f"the body is larger than {limit} bytes", 413)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _check_same_model(given: ModelConfig, served: ModelConfig, folder: str) -> None:
    """ValueError if the folder holds another model than the one served; its dtypes may differ."""
    expected = dataclasses.asdict(dataclasses.replace(served, dtype=given.dtype, param_dtype=given.param_dtype))
    for name, value in dataclasses.asdict(given).items():
        if value != expected[name]:
            raise ValueError(f"{folder}: {name} is {value}, the served model's {expected[name]}; start a server for it")


@dataclass(frozen=True)
class _Asked:
    """A checked request.  sampling: None to score only.  logprob_start: the first input token with a
    log-probability, the number of them for none."""

    ids: tuple[int, ...]
    parameters: dict[str, Any]
    sampling: Sampling | None
    with_logprobs: bool
    logprob_start: int


def _asked(body: dict[str, Any], tokenizer: Tokenizer) -> _Asked:
    _refuse_unknown("field", body, FIELDS)
    parameters = _sampling_parameters(body)
    ids = _input_ids(body, tokenizer)
    with_logprobs = bool(body.get("return_logprob"))
    start = body.get("logprob_start_len")
    start = -1 if start is None else start
    if type(start) is not int or not -1 <= start <= len(ids):
        raise BadRequest(f"logprob_start_len must be -1 (none) or 0 to {len(ids)} tokens, got {start!r:.50}")
    try:
        sampling = _sampling(parameters) if parameters["max_new_tokens"] else None
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return _Asked(ids, parameters, sampling, with_logprobs, start if with_logprobs and start >= 0 else len(ids))


def _refuse_unknown(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        raise BadRequest(f"unknown {what} {unknown[0]!r}; there are {', '.join(known)}")


def _input_ids(body: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise BadRequest("needs either input_ids, a list of token ids, or text")
    if text is not None:
        if not isinstance(text, str):
            raise BadRequest("text must be one string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadRequest("text holds half of a surrogate pair")
        return tokenizer.encode_start(text)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise BadRequest("input_ids must be one list of integers")
    return tuple(ids)


def _sampling_parameters(body: dict[str, Any]) -> dict[str, Any]:
    """Checked for their types, the defaults filled in."""
    given = body.get("sampling_params")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise BadRequest("sampling_params must be an object")
    _refuse_unknown("sampling parameter", given, tuple(SAMPLING_DEFAULTS))
    parameters = SAMPLING_DEFAULTS | given
    for name, value in parameters.items():
        default = SAMPLING_DEFAULTS[name]
        if name == "stop":
            texts = [value] if isinstance(value, str) else [] if value is None else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise BadRequest("stop must be a string or a list of strings")
            if sum(map(len, texts)) > STOP_CHARACTERS:
                raise BadRequest(f"stop strings may have {STOP_CHARACTERS} characters in all")
            parameters["stop"] = texts
        elif type(value) not in ((int, float) if type(default) is float else (type(default),)):
            raise BadRequest(f"{name} must be of type {type(default).__name__}, got {value!r:.50}")
        elif type(default) is float and abs(value) > MAX_FLOAT:
            raise BadRequest(f"{name} is too large")
    if parameters["top_k"] != -1:
        raise BadRequest(f"top_k must be -1 (off), got {parameters['top_k']}")
    return parameters


def _sampling(parameters: dict[str, Any]) -> Sampling:
    return Sampling(
        temperature=parameters["temperature"], top_p=parameters["top_p"], stop=tuple(parameters["stop"]),
        max_new_tokens=parameters["max_new_tokens"], seed=parameters["sampling_seed"],
    )  # fmt: skip


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


def _answer(asked: _Asked, scores: Scores, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """SGLang's answer to `/generate`."""
    ids, versions, parameters = completion.token_ids, completion.weight_versions, asked.parameters
    text = tokenizer.decode(ids)
    ends = {stop: text.find(stop) + len(stop) for stop in parameters["stop"] if stop in text}
    finish: dict[str, Any] = {"type": completion.finish}
    if completion.finish == "length":
        finish["length"] = len(ids)
    elif completion.finish == "stop":
        finish["matched"] = min(ends, key=ends.__getitem__) if ends else ids[-1]
    if parameters["skip_special_tokens"]:
        text = tokenizer.decode([i for i in ids if tokenizer.decode([i]) not in tokenizer.special_tokens])
    if ends and not parameters["no_stop_trim"] and finish["matched"] in text:
        text = text[: text.index(finish["matched"])]
    changes = [i for i, version in enumerate(versions) if i == 0 or versions[i - 1] != version]
    meta = {
        "id": uuid.uuid4().hex, "finish_reason": finish, "prompt_tokens": len(asked.ids),
        "completion_tokens": len(ids), "weight_version": str((scores.weight_version, *versions)[-1]),
        "weight_versions": [
            {"version": str(versions[start]), "start": start, "end": end}
            for start, end in zip(changes, [*changes, len(ids)][1:], strict=True)
        ],
    }  # fmt: skip
    if asked.with_logprobs:
        start = asked.logprob_start
        rows = zip((None, *scores.logprobs[start:]), asked.ids[start:], strict=start < len(asked.ids))
        meta["input_token_logprobs"] = [[x, i, None] for x, i in rows]
        meta["output_token_logprobs"] = [[x, i, None] for x, i in zip(completion.logprobs, ids, strict=True)]
    return {"text": text, "output_ids": list(ids), "meta_info": meta}
