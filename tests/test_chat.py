"""The chat client against a real HTTP server on this machine."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from etagent_jax.chat import TRIES, ChatEndpoint, ChatError

ASKED = [{"role": "user", "content": "hello"}]


class Server:
    """Answers with the scripted statuses, then 200; keeps what it was sent."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.reply: object = {"choices": [{"message": {"content": "hi"}}]}
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        app = Starlette(routes=[Route("/v1/chat/completions", self.answer, methods=["POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    async def answer(self, request: Request) -> Response:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        await asyncio.sleep(0.02)
        self.running -= 1
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return PlainTextResponse("not now", status)
        return JSONResponse(self.reply)

    @property
    def url(self) -> str:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    while not server.server.started:
        time.sleep(0.01)
    yield server
    server.server.should_exit = True
    server.thread.join()


async def test_a_request_is_what_the_api_asks_for(server):
    endpoint = ChatEndpoint(f"{server.url}/", "some-model", "secret", temperature=0.5, max_tokens=7)
    assert await endpoint.complete(ASKED) == "hi"
    await endpoint.close()
    assert server.bodies == [{"model": "some-model", "messages": ASKED, "temperature": 0.5, "max_tokens": 7}]
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_may_pass_is_tried_again(server, status):
    server.statuses = [status, status]
    endpoint = ChatEndpoint(server.url, "m", backoff=0.01)
    assert await endpoint.complete(ASKED) == "hi"
    await endpoint.close()
    assert len(server.bodies) == 3


async def test_a_server_that_stays_ill_is_named(server):
    server.statuses = [503] * 20
    endpoint = ChatEndpoint(server.url, "m", backoff=0.01)
    with pytest.raises(ChatError, match=f"{server.url}/chat/completions answered HTTP 503.*not now"):
        await endpoint.complete(ASKED)
    await endpoint.close()
    assert len(server.bodies) == TRIES


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_what_will_not_pass_is_not_tried_again(server, status):
    server.statuses = [status]
    endpoint = ChatEndpoint(server.url, "m")
    with pytest.raises(ChatError, match=f"{server.url}/chat/completions answered HTTP {status}.*check the model"):
        await endpoint.complete(ASKED)
    await endpoint.close()
    assert len(server.bodies) == 1


@pytest.mark.parametrize("reply", [[], {"choices": []}, {"choices": [{"message": {"content": None}}]}, "hi"])
async def test_a_reply_without_text_is_an_error_that_names_the_url(server, reply):
    server.reply = reply
    endpoint = ChatEndpoint(server.url, "m")
    with pytest.raises(ChatError, match=server.url):
        await endpoint.complete(ASKED)
    await endpoint.close()


async def test_no_server_at_all():
    endpoint = ChatEndpoint("http://127.0.0.1:9/v1", "m", backoff=0.01)
    with pytest.raises(ChatError, match=r"http://127\.0\.0\.1:9/v1/chat/completions cannot be reached"):
        await endpoint.complete(ASKED)
    await endpoint.close()


async def test_at_most_so_many_requests_at_once(server):
    endpoint = ChatEndpoint(server.url, "m", concurrency=2)
    assert await asyncio.gather(*(endpoint.complete(ASKED) for _ in range(8))) == ["hi"] * 8
    await endpoint.close()
    assert server.most_running == 2


def test_a_url_needs_its_scheme():
    with pytest.raises(ValueError, match=r"localhost:80.*http://"):
        ChatEndpoint("localhost:80", "m")
