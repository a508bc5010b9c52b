"""One LLM endpoint that speaks OpenAI's chat API: what the reviser, the judge and the summariser are asked through."""

import asyncio
import functools
import json
from collections.abc import Sequence
from typing import Protocol

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": …}`"""

TRIES = 5


class ChatError(RuntimeError):
    """The endpoint gave no usable reply; the message names its URL and what to do."""


class Chat(Protocol):
    """Whoever answers chat messages: an endpoint, or a stand-in for one."""

    async def complete(self, messages: Sequence[Message]) -> str:
        """The text of the reply; raises ChatError when there is none."""
        ...


class _BadStatus(Exception):
    """An HTTP status of 400 or more."""

    def __init__(self, status: int, said: str):
        self.status, self.said = status, said


def _is_transient(error: BaseException) -> bool:
    """True for what may pass by itself: no connection, a time-out, 429 and 5xx."""
    if isinstance(error, _BadStatus):
        return error.status == 429 or error.status >= 500
    return isinstance(error, aiohttp.ClientError | TimeoutError)


class ChatEndpoint:
    """A client of `POST {url}/chat/completions`.

    url: up to and including the version, e.g. `http://localhost:30000/v1`.
    timeout: seconds for one try.  concurrency: most requests in flight at once.
    backoff: seconds; the pause after try n is drawn from [0, backoff · 2ⁿ⁻¹], at most 30.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, *, temperature: float = 0.0, max_tokens: int = 2048,
        timeout: float = 120.0, concurrency: int = 16, backoff: float = 1.0,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"chat endpoint {url!r}: the URL must start with http:// or https://")
        if concurrency < 1:
            raise ValueError(f"chat endpoint {url}: concurrency must be at least 1, got {concurrency}")
        self.url = f"{url.rstrip('/')}/chat/completions"
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._backoff = backoff
        self._slots = asyncio.Semaphore(concurrency)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:  # made in the event loop that uses it
        # `concurrency` bounds the requests: a queue for connections would count against their time limit
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout, trust_env=True)

    async def complete(self, messages: Sequence[Message]) -> str:
        """The text of the first choice.

        Connection errors, time-outs, 429 and 5xx are tried again; any other status is final.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(_is_transient), stop=stop_after_attempt(TRIES), reraise=True,
            wait=wait_random_exponential(multiplier=self._backoff, max=30),
        )  # fmt: skip
        try:
            async with self._slots:
                said: str = await retrying(self._post, messages)
        except _BadStatus as error:
            advice = (
                f"after {TRIES} tries" if _is_transient(error) else "check the model's name, the key and the prompt"
            )
            raise ChatError(f"{self.url} answered HTTP {error.status} ({advice}): {error.said[:200]}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatError(
                f"{self.url} cannot be reached ({type(error).__name__}: {error}; {TRIES} tries): is the server up?"
            ) from error
        return self._text(said)

    async def close(self) -> None:
        await self._session.close()

    async def _post(self, messages: Sequence[Message]) -> str:
        async with self._session.post(self.url, json={**self._body, "messages": list(messages)}) as response:
            said = await response.text(errors="replace")
        if response.status >= 400:
            raise _BadStatus(response.status, said)
        return said

    def _text(self, said: str) -> str:
        try:
            text = json.loads(said)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ChatError(f"{self.url} did not answer with a chat completion: {said[:200]!r}") from error
        if not isinstance(text, str):
            raise ChatError(f"{self.url} answered without text (a tool call, or thinking only): {said[:200]!r}")
        return text
