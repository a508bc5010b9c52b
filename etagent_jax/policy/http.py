"""One request to a server: what it answers, or an error that says whether another try may help."""

import functools
import json
from typing import Any

import aiohttp

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 4.0  # less than a server's 5, so that no request goes out on a connection that is being closed
NOT_NOW = (429, 503)
"""Statuses that say nothing about the request: a full queue, a server that still loads, a router without workers."""


class SGLangError(ConnectionError):
    """The server gave no usable reply; the message names its URL and what to do."""


class Refused(SGLangError):
    """HTTP 4xx: the same request will be refused again."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Failed(SGLangError):
    """Another try may help, now or on another server."""


class Unavailable(Failed):
    """The server is away or too busy, whatever it is asked."""


class TimedOut(Unavailable):
    """The server may still be at work on the request."""


class Broken(Failed):
    """HTTP 5xx, or an answer that makes no sense: the request itself may be the reason."""


class Http:
    """Connections to servers, kept open, with one key for all.  One event loop until `close`."""

    def __init__(self, api_key: str | None = None):
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:  # made in the event loop that uses it
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
        return aiohttp.ClientSession(connector=connector, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar())

    async def close(self) -> None:
        await self._session.close()

    async def send(
        self, method: str, url: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None,
        *, seconds: float,
    ) -> bytes:  # fmt: skip
        """The body of the answer; `Refused` for 4xx, one of `Failed` if there is none within `seconds`."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self._session.request(method, url, json=body, headers=headers, timeout=timeout) as response:
                status, said = response.status, await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise Unavailable(f"{url} cannot be reached (no connection within {CONNECT_SECONDS:g} s)") from error
        except TimeoutError as error:
            raise TimedOut(f"{url} did not answer within {seconds:.3g} s") from error
        except aiohttp.ClientError as error:
            raise Unavailable(f"{url} cannot be reached ({type(error).__name__}: {error})") from error
        if status < 400:
            return said
        message = f"{url} answered HTTP {status}: {_message(said)}"
        if status in NOT_NOW:
            raise Unavailable(message)
        if status < 500:
            raise Refused(message, status)
        raise Broken(message)

    async def ask(
        self, method: str, url: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None,
        *, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        """As `send`, the answer a JSON object; `Broken` if it is none."""
        said = await self.send(method, url, body, headers, seconds=seconds)
        try:
            answer = json.loads(said)
        except ValueError as error:
            raise Broken(f"{url} did not answer with JSON: {_text(said)!r}") from error
        if not isinstance(answer, dict):
            raise Broken(f"{url} did not answer with a JSON object: {_text(said)!r}")
        return answer


def _text(said: bytes) -> str:
    return said[:500].decode(errors="replace")


def _message(said: bytes) -> str:
    """What an error response says, in its own words."""
    try:
        answer = json.loads(said)
        error = answer.get("error", answer.get("message", answer))
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return _text(said)
