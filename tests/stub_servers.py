"""Stand-ins for SGLang servers and routers on real sockets, and a line to them that can be cut."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from etagent_jax.policy.interface import Completion, Sampling
from etagent_jax.policy.sglang import SGLangPolicy
from tests.test_serving import running

SAMPLING = Sampling(1.0, 4)
FAST = {"backoff": 0.002, "patience": 20.0}


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def generate_many(policy: SGLangPolicy, count: int, session: str = "s{}") -> list[Completion]:
    """All at once, each in a session of its own."""
    return await asyncio.gather(*(policy.generate((1, i % 9), SAMPLING, session.format(i)) for i in range(count)))


class StubServer:
    """Answers what the SGLang server of its weights would, by a rule: one token, 100 + its weight version.

    path, body of every POST are in `calls`.  To be set: seconds that a generation takes, or `held` until it is not;
    `faults`, answers given first; `folders` that can be loaded; `says_version`, what `/model_info` lies.
    """

    def __init__(self, key: str | None = None):
        self.key, self.seconds, self.held, self.faults = key, 0.0, False, list[Response]()
        self.folders = {"/w/1", "/w/2", "/w/3"}
        self.says_version: str | None = None
        self.model_info = {"model_path": "/model", "tokenizer_path": "/model", "model_type": "qwen2"}
        self.server_info = {"max_req_input_len": 90, "context_length": 96}
        self.encoded: list[int] = []
        self.calls: list[tuple[str, dict]] = []
        self.sessions: list[str] = []
        self.running = self.most_running = 0
        self.restart()

    def restart(self) -> None:
        """As a launcher does it: the weights are again those of the launch."""
        self.version, self.paused, self.well = "default", False, True

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    async def answer(self, request: Request) -> Response:
        path = request.url.path[1:]
        if path == "health":
            return Response(status_code=200 if self.well and not self.paused else 503)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        if path == "model_info":
            return JSONResponse(self.model_info | {"weight_version": self.says_version or self.version})
        if path == "server_info":
            return JSONResponse(self.server_info)
        if path == "workers":
            return Response(status_code=404)
        body = await request.json()
        self.calls.append((path, body))
        if path == "generate":
            self.sessions.append(request.headers.get("x-smg-routing-key", ""))
            return await self._generate(body)
        if path in ("pause_generation", "continue_generation"):
            self.paused = path == "pause_generation"
        elif path == "update_weights_from_disk":
            if body["model_path"] not in self.folders:
                return JSONResponse({"success": False, "message": f"no {body['model_path']}"}, 400)
            self.version = body["weight_version"]
        return JSONResponse({"success": True})

    async def _generate(self, body: dict) -> Response:
        if self.faults:
            return self.faults.pop(0)
        if "text" in body:
            return JSONResponse({"meta_info": {"input_token_logprobs": [[None, i, None] for i in self.encoded]}})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        began = self.version
        await asyncio.sleep(self.seconds)
        while self.paused or self.held:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self.running -= 1
        versions = [began] if began == self.version else [began, self.version]
        ids = [100 + int(version.replace("default", "0")) for version in versions]
        meta = {
            "id": body["rid"], "completion_tokens": len(ids), "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-1.0, id, None] for id in ids], "weight_version": self.version,
            "weight_versions": [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)],
        }  # fmt: skip
        return JSONResponse({"meta_info": meta})

    @contextmanager
    def serving(self) -> Iterator[str]:
        methods = ["GET", "POST"]
        with running(Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])) as url:
            yield url


def two_servers() -> Iterator[tuple[list[StubServer], list[str]]]:
    """Two of them, and their URLs."""
    stubs = [StubServer(), StubServer()]
    with stubs[0].serving() as first, stubs[1].serving() as second:
        yield stubs, [first, second]


class Line:
    """A TCP line to a server.  `cut` it, and it is as if the server had been killed; `mend` it."""

    def __init__(self, url: str, delay: float):
        self._port, self._delay = int(url.rpartition(":")[2]), delay
        self._open: set[asyncio.StreamWriter] = set()
        self._up = True

    def cut(self) -> None:
        self._up = False
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        self._up = True

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._up:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        ends = {writer, far_writer}
        self._open |= ends
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
        self._open -= ends
        for end in ends:
            end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            await asyncio.sleep(self._delay)
            writer.write(data)
            await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def line_to(url: str, delay: float = 0.0) -> AsyncGenerator[tuple[Line, str], None]:
    """A line that holds up every piece of data for `delay` seconds, and its own URL."""
    line = Line(url, delay)
    server = await asyncio.start_server(line.connect, "127.0.0.1", 0)
    try:
        yield line, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        line.cut()
        server.close()
        await server.wait_closed()
