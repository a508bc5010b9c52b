"""What a server is asked and told besides `/generate`: what it serves, new weights, pauses, memory."""

import asyncio
import contextlib
from typing import Any

from etagent_jax.policy.answers import version_name, version_number
from etagent_jax.policy.http import Broken, Failed, Http, Refused, SGLangError, Unavailable
from etagent_jax.policy.servers import Server

HEALTH_SECONDS = 30.0  # SGLang gives up on itself after 20
ABORT_SECONDS = 5.0
IDLE_PAUSE = 0.1  # seconds
NO_SUCH_ROUTE = (404, 405)


class Control:
    """The control routes of all servers.  seconds: until one of them has answered.  life: see SGLangPolicy."""

    def __init__(self, http: Http, seconds: float, life: int):
        self._http, self._seconds, self._life = http, seconds, life
        self._lent: dict[str, int] = {}  # by URL, the version of a server that has given its memory back

    async def survey(self, server: Server) -> None:
        """Find the server's workers, which are itself unless it is a router, and what all of them take."""
        try:
            answer = await self._http.ask("GET", f"{server.url}/workers", seconds=self._seconds)
        except Refused:
            urls = [server.url]
        else:
            urls = [worker["url"].rstrip("/") for worker in answer.get("workers", ())]
            if not urls:
                raise Unavailable(f"{server.url} has no workers yet")
        known = {worker.url: worker for worker in (server, *(server.workers or ()))}
        workers = [known.get(url) or Server(url) for url in urls]
        for worker in workers:
            await self._ask_limits(worker)
        server.context = min(worker.context for worker in workers)
        server.max_input = min(worker.max_input for worker in workers)
        server.workers = workers

    async def _ask_limits(self, worker: Server) -> None:
        """How many tokens a sequence may have, and its input; no bound is known if the server has no such route."""
        with contextlib.suppress(Refused):
            answer = await self.info(worker, "server_info")
            if isinstance(limit := answer.get("max_req_input_len"), int):
                worker.max_input = limit - 1  # SGLang refuses an input that is as long as this
                worker.context = limit  # SGLang has room for a few tokens more, and does not say how many
            if isinstance(limit := answer.get("context_length"), int):
                worker.context = limit

    async def info(self, worker: Server, name: str) -> dict[str, Any]:
        """`/model_info` or `/server_info`, in older servers `/get_…`."""
        try:
            return await self._http.ask("GET", f"{worker.url}/{name}", seconds=self._seconds)
        except Refused as error:
            if error.status not in NO_SUCH_ROUTE:
                raise
        return await self._http.ask("GET", f"{worker.url}/get_{name}", seconds=self._seconds)

    async def version(self, worker: Server) -> int:
        """Of the weights that it serves."""
        name = str((await self.info(worker, "model_info")).get("weight_version"))
        try:
            return version_number(name, self._life)
        except ValueError as error:
            raise Broken(f"{worker.url}/model_info: {error}") from error

    async def load(self, worker: Server, version: int, folder: str) -> None:
        """Serve the folder's weights as `version`, no cached prefix of older ones.  Hold the worker's lock.

        Open requests stay and go on with the new weights.  Whatever happens, the server is not left paused.
        """
        try:
            await self.tell(worker, "pause_generation", {"mode": "retract"})
            body = {"model_path": folder, "weight_version": version_name(version, self._life)}
            await self.tell(worker, "update_weights_from_disk", body)
            try:
                await self.tell(worker, "flush_cache")
            except Refused as error:
                raise Unavailable(f"{worker.url}: another client lets it go on amid an update: {error}") from error
        finally:
            await self.tell(worker, "continue_generation")
        served = await self.version(worker)
        if served != version:
            raise SGLangError(
                f"{worker.url} reports weight version {served} after it was given {version} from {folder}: "
                "does another run use this server?"
            )

    async def release_memory(self, worker: Server) -> None:
        """Have it give its memory back, once all its requests are ended: SGLang dies if one runs at that moment.

        SGLangError if they do not end in time.
        """
        await self.tell(worker, "abort_request", {"abort_all": True})
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    try:
                        await self.tell(worker, "flush_cache")  # refused while anything runs
                        break
                    except Refused:
                        await asyncio.sleep(IDLE_PAUSE)
        except TimeoutError as error:
            raise SGLangError(f"{worker.url} still runs requests after {self._seconds:g} s") from error
        self._lent[worker.url] = await self.version(worker)
        await self.tell(worker, "release_memory_occupation")

    async def resume_memory(self, worker: Server) -> None:
        """Have it take its memory again; one that was started anew meanwhile has it, and would die of it."""
        if await self.version(worker) == self._lent.pop(worker.url, None):
            await self.tell(worker, "resume_memory_occupation")

    async def tell(self, worker: Server, what: str, body: dict[str, Any] | None = None) -> None:
        await self._http.send("POST", f"{worker.url}/{what}", body or {}, seconds=self._seconds)

    async def unpause(self, worker: Server) -> None:
        """Let a server generate that whoever paused it may have left so."""
        try:
            await self.tell(worker, "continue_generation")
        except Refused as error:
            if error.status not in NO_SUCH_ROUTE:
                raise

    async def check_health(self, server: Server) -> None:
        """One of `Failed` if it is not well.  A server that is paused is not: it answers after 20 seconds."""
        await self._http.send("GET", f"{server.url}/health", seconds=min(HEALTH_SECONDS, self._seconds))

    async def abort(self, worker: Server, rid: str) -> None:
        """End the request if it is there.  A server that cannot be told finds its connection closed."""
        url, seconds = f"{worker.url}/abort_request", min(ABORT_SECONDS, self._seconds)
        with contextlib.suppress(Failed, Refused):
            await self._http.send("POST", url, {"rid": rid}, seconds=seconds)
