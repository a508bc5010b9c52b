"""A policy over SGLang's native HTTP API, token ids in and out; the embedded server speaks it too."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from etagent_jax.policy.interface import Completion, Finish, Sampling, Scores

TRIES = 5
SESSION_HEADER = "X-SMG-Routing-Key"
"""Names a trajectory; a router keeps it on the worker that holds its prefix."""

FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


T = TypeVar("T")


class SGLangError(RuntimeError):
    """The server gave no usable reply; the message names its URL and what to do."""


class SGLangPolicy:
    """A Policy that asks an SGLang server, or one that speaks its `/generate`.

    url: e.g. `http://localhost:30000`.  vocab_size: of the model, to refuse an id beyond it, which
    would kill an SGLang server.  timeout: seconds until a request is answered.  concurrency: most
    requests in flight at once.  backoff: seconds; the pause after try n is drawn from
    [0, backoff · 2ⁿ⁻¹], at most 30.  One event loop at a time.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, vocab_size: int | None = None, timeout: float = 600.0,
        concurrency: int = 256, backoff: float = 1.0,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"SGLang server {url!r}: the URL must start with http:// or https://")
        if concurrency < 1:
            raise ValueError(f"SGLang server {url}: concurrency must be at least 1, got {concurrency}")
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self._timeout, self._backoff = timeout, backoff
        self._slots = asyncio.Semaphore(concurrency)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # `concurrency` bounds the requests: a queue inside httpx would count against their time limit.
        self._client = httpx.AsyncClient(
            headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None), trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        """Continue `token_ids`.

        Raises ValueError for ids outside the vocabulary and SGLangError for what the server says.
        No connection, a broken one and 5xx are tried again; 4xx and a time-out are final.
        """
        body = {
            "input_ids": self._checked(token_ids),
            "sampling_params": {
                "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1,
                "max_new_tokens": sampling.max_new_tokens, "stop": list(sampling.stop),
                "sampling_seed": sampling.seed, "no_stop_trim": True, "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
            },
            "return_logprob": True,
        }  # fmt: skip
        headers = {SESSION_HEADER: quote(session)} if session else {}
        return self._read(await self._request("POST", "/generate", body, headers), _completion)

    async def score(self, token_ids: Sequence[int]) -> Scores:
        """The log-probability of each of `token_ids` but the first, given those before it, at temperature 1.

        Errors as `generate`'s.
        """
        body = {
            "input_ids": self._checked(token_ids), "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True, "logprob_start_len": 0,
        }  # fmt: skip
        answer = await self._request("POST", "/generate", body)
        return self._read(answer, lambda meta: _scores(meta, len(token_ids)))

    async def model_info(self) -> dict[str, Any]:
        """What the server serves: `model_path`, `weight_version` and more; SGLangError if it cannot say."""
        return await self._request("GET", "/get_model_info")

    async def update_weights(self, version: int, folder: str | Path) -> None:
        """Serve the Hugging Face `folder` (as the server sees the path) from now on, as `version`."""
        body = {"model_path": str(folder), "weight_version": str(version)}
        answer = await self._request("POST", "/update_weights_from_disk", body)
        if answer.get("success") is not True:
            raise SGLangError(f"{self.url} did not take the weights in {folder}: {answer.get('message', answer)}")

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        if not token_ids:
            raise ValueError("no tokens given; an input has at least 1")
        if min(token_ids) < 0 or (self.vocab_size is not None and max(token_ids) >= self.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {self.vocab_size}")
        return list(token_ids)

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object that the server answers."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_pass), stop=stop_after_attempt(TRIES), reraise=True,
            wait=wait_random_exponential(multiplier=self._backoff, max=30),
        )  # fmt: skip
        url = self.url + path
        try:
            async with self._slots:
                response: httpx.Response = await retrying(self._send, method, url, body, headers)
        except httpx.HTTPStatusError as error:
            code, said = error.response.status_code, _message(error.response)
            tries = f" ({TRIES} tries)" if _may_pass(error) else ""
            raise SGLangError(f"{url} answered HTTP {code}{tries}: {said}") from error
        except httpx.TimeoutException as error:
            advice = "raise the timeout, or ask for less at once"
            raise SGLangError(f"{url} did not answer within {self._timeout:g} s: {advice}") from error
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}; {TRIES} tries"
            raise SGLangError(f"{url} cannot be reached ({reason}): is the server up?") from error
        try:
            answer = response.json()
        except ValueError as error:
            raise SGLangError(f"{url} did not answer with JSON: {response.text[:200]!r}") from error
        if not isinstance(answer, dict):
            raise SGLangError(f"{url} did not answer with a JSON object: {response.text[:200]!r}")
        return answer

    async def _send(
        self, method: str, url: str, body: dict[str, Any] | None, headers: dict[str, str] | None
    ) -> httpx.Response:
        response = await self._client.request(method, url, json=body, headers=headers)
        return response.raise_for_status()

    def _read(self, answer: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the answer's `meta_info`."""
        try:
            return read(answer["meta_info"])
        except (LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise SGLangError(f"{self.url}/generate did not answer as SGLang does ({said}): {answer!r:.300}") from error


def _completion(meta: dict[str, Any]) -> Completion:
    count = meta["completion_tokens"]
    # Some servers repeat entries before the last `count`.
    rows = meta["output_token_logprobs"][-count:] if count else []
    finish = FINISHES[meta["finish_reason"]["type"]]
    spans = meta.get("weight_versions") or [{"version": _served(meta), "start": 0, "end": count}]
    versions = [_version(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    ids, logprobs = tuple(int(row[1]) for row in rows), tuple(float(row[0]) for row in rows)
    return Completion(ids, logprobs, finish, tuple(versions))


def _scores(meta: dict[str, Any], count: int) -> Scores:
    rows = meta["input_token_logprobs"]
    if len(rows) != count:
        raise ValueError(f"{len(rows)} input_token_logprobs for {count} tokens")
    return Scores(tuple(float(row[0]) for row in rows[1:]), _version(_served(meta)))


def _served(meta: dict[str, Any]) -> str:
    return str(meta.get("weight_version", "default"))


def _may_pass(error: BaseException) -> bool:
    """True for what may be over at the next try."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)


def _version(name: str) -> int:
    """SGLang's weight version as a number; `default` is the weights the server was launched with."""
    if name == "default":
        return 0
    if not name.isdecimal():
        raise ValueError(f"weight version {name!r} is not a number")
    return int(name)


def _message(response: httpx.Response) -> str:
    """What an error response says, in its own words."""
    try:
        answer = response.json()
        error = answer.get("error", answer)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
