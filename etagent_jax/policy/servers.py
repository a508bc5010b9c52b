"""Several servers as one: which of them takes a request."""

import asyncio
import itertools
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence, Set
from contextlib import asynccontextmanager, contextmanager

from etagent_jax.policy.http import Failed, SGLangError

FAILURES = 3
"""So many in a row, and a server gets no requests until a probe finds it well."""
SESSIONS = 1 << 16
"""So many sessions are remembered."""
PROBE_PAUSE, MAX_PAUSE = 5.0, 30.0  # seconds


def pause(backoff: float, failures: int, most: float = MAX_PAUSE) -> float:
    """Seconds to wait after so many failures: drawn from [0, backoff · 2ᶠᵃⁱˡᵘʳᵉˢ⁻¹], at most `most`."""
    return random.uniform(0, min(most, backoff * 2.0 ** min(failures - 1, 30)))


class Patience:
    """The seconds that one request may still lose to servers that do not answer.  Waiting for a slot costs none."""

    def __init__(self, seconds: float):
        self.left = seconds

    @contextmanager
    def spent(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.left -= time.monotonic() - start


class Server:
    """One server.

    slots: most requests in flight.  workers: the servers that hold the weights, itself or a router's; None before
    anybody asked.  context, max_input: most tokens of a sequence, and of its input.  said: its last failure.
    """

    def __init__(self, url: str, slots: int = 0):
        self.url, self.slots = url, slots
        self.workers: list[Server] | None = None
        self.context, self.max_input = sys.maxsize, sys.maxsize
        self.lock, self.surveying = asyncio.Lock(), asyncio.Lock()  # its weights change; it is asked for the first time
        self.up, self.failures, self.said = True, 0, "nothing was asked yet"
        self.in_flight, self.last_taken = 0, 0
        self.waiting: deque[asyncio.Future[Server | None]] = deque()


class Pool:
    """Hands out servers: a session's own as long as it is up, else the least busy one.

    revive: what is done now and then with a server that is down; once it raises no SGLangError, the server is up.
    """

    def __init__(self, servers: Sequence[Server], revive: Callable[[Server], Awaitable[None]], backoff: float):
        self.servers, self._revive, self._backoff = servers, revive, backoff
        self._anywhere: deque[asyncio.Future[Server | None]] = deque()
        self._sessions: OrderedDict[str, Server] = OrderedDict()
        self._taken = itertools.count(1)
        self._probes: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

    @asynccontextmanager
    async def slot(self, session: str, patience: Patience, avoid: Set[Server]) -> AsyncGenerator[Server, None]:
        """A server that is up, one of its slots taken; waits for one.  TimeoutError if all are down for too long.

        Those to `avoid` come last.
        """
        server = await self._take(session, patience, avoid)
        server.last_taken = next(self._taken)
        if session:
            self._sessions[session] = server
            self._sessions.move_to_end(session)
            if len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
        try:
            yield server
        finally:
            self._give_back(server)

    def answered(self, server: Server) -> None:
        server.failures = 0

    def failed(self, server: Server, error: Failed, allowed: int = FAILURES) -> None:
        """After so many failures in a row the server gets no requests until it is revived."""
        server.failures += 1
        server.said = str(error)
        if server.failures >= allowed and server.up:
            self._take_down(server)

    def _take_down(self, server: Server) -> None:
        server.up = False
        _wake(server.waiting)
        if not any(other.up for other in self.servers):
            _wake(self._anywhere)
        probe = asyncio.create_task(self._probe(server))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, server: Server) -> None:
        for n in itertools.count(1):
            await asyncio.sleep(pause(self._backoff, n, PROBE_PAUSE))
            try:
                await self._revive(server)
                break
            except SGLangError as error:
                server.said = str(error)
        server.up, server.failures = True, 0
        _wake(self._anywhere)

    async def _take(self, session: str, patience: Patience, avoid: Set[Server]) -> Server:
        while True:
            own = self._sessions.get(session)
            up = [server for server in self.servers if server.up]
            if not up:
                with patience.spent():
                    async with asyncio.timeout(patience.left):
                        await self._wait(self._anywhere)
                continue
            up = [server for server in up if server not in avoid] or up
            stays = own in up
            server = own if own and stays else min(up, key=lambda s: (s.in_flight / s.slots, s.last_taken))
            if server.in_flight < server.slots:
                server.in_flight += 1
                return server
            given = await self._wait(server.waiting if stays else self._anywhere)
            if given is not None:
                return given

    async def _wait(self, queue: "deque[asyncio.Future[Server | None]]") -> Server | None:
        """The server whose slot was handed over, or None: look again."""
        future: asyncio.Future[Server | None] = asyncio.get_running_loop().create_future()
        queue.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and (server := future.result()):
                self._give_back(server)
            raise

    def _give_back(self, server: Server) -> None:
        server.in_flight -= 1
        for queue in (server.waiting, self._anywhere):
            while server.up and server.in_flight < server.slots and queue:
                future = queue.popleft()
                if not future.done():
                    server.in_flight += 1
                    future.set_result(server)


def _wake(queue: "deque[asyncio.Future[Server | None]]") -> None:
    while queue:
        future = queue.popleft()
        if not future.done():
            future.set_result(None)
