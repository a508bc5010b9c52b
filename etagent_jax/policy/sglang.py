"""A policy over SGLang's native HTTP API, token ids in and out; the embedded server speaks it too."""

import asyncio
import itertools
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from etagent_jax.policy.answers import read_completion, read_scores
from etagent_jax.policy.control import Control
from etagent_jax.policy.http import Broken, Failed, Http, SGLangError, TimedOut, Unavailable
from etagent_jax.policy.interface import Completion, Sampling, Scores
from etagent_jax.policy.likeness import check_model, check_tokenizer
from etagent_jax.policy.servers import Patience, Pool, Server, pause
from etagent_jax.tokenizer import Tokenizer

TRIES = 5
SESSION_HEADER = "X-SMG-Routing-Key"
"""Names a trajectory; a router keeps it on the worker that holds its prefix."""
READY_PAUSE = 1.0  # seconds

T = TypeVar("T")


@dataclass
class Statistics:
    """What a policy has done so far.

    requests: that were answered.  retries: tries beyond the first.  stale: answers of older weights than expected,
    not used.  brought_up_to_date: times a server was found with old weights and given the new.  aborted: requests
    given up on, by cancellation or at their time limit.
    """

    requests: int = 0
    retries: int = 0
    stale: int = 0
    brought_up_to_date: int = 0
    aborted: int = 0


class Stale(Broken):
    """The answer is of older weights than expected."""


class SGLangPolicy:
    """A Policy that asks SGLang servers, or those that speak its `/generate`.

    urls: of one server or several, e.g. `http://localhost:30000`; or of a sglang-router, whose workers this machine
    can reach too: weights go to each of them.  vocab_size: of the model, to refuse an id beyond it, which would kill
    an SGLang server.  context: most tokens of a sequence, if fewer than the server takes.  timeout: seconds until
    one try is answered.  patience: seconds in all that a request may lose to servers that do not answer.
    concurrency: most requests in flight at once on each server (of a router: on each worker).  backoff: seconds; the
    pause after try n is drawn from [0, backoff · 2ⁿ⁻¹], at most 30.  life: a number that all processes of a run share
    and no earlier start of it had, so that weights which servers still have from then are not taken for new ones.
    One event loop until `close`.

    Every request raises SGLangError for what a server says or fails to say.  HTTP 4xx is final; 5xx and an answer
    that makes no sense are tried TRIES times, on whichever server is up; no connection, 429, 503 and a try over its
    time limit as long as `patience` lasts.
    """

    def __init__(
        self, urls: str | Sequence[str], *, api_key: str | None = None, vocab_size: int | None = None,
        context: int | None = None, timeout: float = 600.0, patience: float = 1800.0, concurrency: int = 256,
        backoff: float = 1.0, life: int = 0,
    ):  # fmt: skip
        self.urls = tuple(url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"SGLang servers {', '.join(self.urls) or '(none)'}: give at least one, each once")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"SGLang server {url!r}: the URL must start with http:// or https://")
        if concurrency < 1:
            raise ValueError(f"SGLang servers: concurrency must be at least 1, got {concurrency}")
        self.vocab_size, self.context = vocab_size, context
        self.statistics = Statistics()
        self._timeout, self._patience, self._backoff, self._concurrency = timeout, patience, backoff, concurrency
        self._http = Http(api_key)
        self._life, self._lent = life, False
        self._control = Control(self._http, timeout, life)
        self._pool = Pool([Server(url, concurrency) for url in self.urls], self._revive, backoff)
        self._expected: tuple[int, str] | None = None  # version and folder
        self._updating = asyncio.Lock()
        self._aborting: set[asyncio.Future[list[None]]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._pool.close()
        await asyncio.gather(*self._aborting)
        await self._http.close()

    @property
    def version(self) -> int:
        """Of the weights that the servers are expected to have; 0 if none were given to them."""
        return self._expected[0] if self._expected else 0

    @property
    def shortest_context(self) -> int:
        """Most tokens of a sequence that every server takes, as far as they have said."""
        return min(server.context for server in self._pool.servers)

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, session: str = "") -> Completion:
        """Continue `token_ids`; with no room left in the context, by nothing: a Completion of no tokens, `length`.

        Cancelled, it also ends the request on the server.  Raises ValueError for ids outside the vocabulary.
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
        completion = await self._request(body, lambda meta: read_completion(meta, self._life), session)
        return completion or Completion((), (), "length", ())

    async def score(self, token_ids: Sequence[int]) -> Scores:
        """The log-probability of each of `token_ids` but the first, given those before it, at temperature 1.

        Raises ValueError for ids outside the vocabulary.
        """
        body = {
            "input_ids": self._checked(token_ids), "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True, "logprob_start_len": 0,
        }  # fmt: skip
        scores = await self._request(body, lambda meta: read_scores(meta, len(token_ids), self._life))
        assert scores is not None
        return scores

    async def model_info(self) -> dict[str, Any]:
        """What the first server serves: `model_path`, `weight_version` and more."""
        return await self._control.info(self._pool.servers[0], "model_info")

    async def wait_until_ready(self, seconds: float, say: Callable[[str], None] = print) -> None:
        """Until every server is well, and none is paused; `say` hears what they wait for whenever that changes.

        SGLangError names those that are not ready after so many seconds, and what they say.
        """
        waiting = {server.url: "no answer yet" for server in self._pool.servers}

        async def until_ready(server: Server) -> None:
            while server.url in waiting:
                try:
                    for worker in await self._workers(server):
                        await self._control.unpause(worker)
                        await self._control.check_health(worker)
                    await self._control.check_health(server)
                    await self._survey(server)  # now it knows all about itself
                    del waiting[server.url]
                except Failed as error:
                    if waiting[server.url] != str(error):
                        waiting[server.url] = str(error)
                        say(f"waiting for {server.url}: {error}")
                    await asyncio.sleep(READY_PAUSE)

        tasks = [asyncio.create_task(until_ready(server)) for server in self._pool.servers]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
        if waiting:
            said = "; ".join(f"{url} ({text})" for url, text in waiting.items())
            raise SGLangError(f"not ready after {seconds:g} s: {said}; see the servers' own logs")

    async def check(self, tokenizer: Tokenizer, model_folder: str | Path) -> None:
        """SGLangError if a server serves another kind of model than the folder's, or has another tokenizer."""
        for server in self._pool.servers:
            for worker in await self._workers(server):
                info = await self._control.info(worker, "model_info")
                vocab_size = check_model(worker.url, info, Path(model_folder))
                self.vocab_size = self.vocab_size or vocab_size
                await check_tokenizer(self._http, worker.url, info, tokenizer, str(model_folder), self._timeout)

    def expect(self, version: int, folder: str | Path) -> None:
        """From now on answers must be of `version` or later; a server found with older weights is given `folder`."""
        self._expected = version, str(folder)

    async def update_weights(self, version: int, folder: str | Path) -> None:
        """Serve the Hugging Face `folder` (as the servers see the path) from now on, as `version`, on all servers.

        Open requests go on with the new weights.  SGLangError if a server refuses them: it then goes on with its
        old ones.  A server that is away gets no requests until it is back and has them, too.
        """
        async with self._updating:
            patience = Patience(self._patience)
            for n in itertools.count(1):
                with patience.spent():
                    failed = await _all(self._load(server, version, str(folder)) for server in self._pool.servers)
                    if len(failed) < len(self._pool.servers):
                        break
                    if patience.left <= 0:
                        raise self._no_answer() from failed[0]
                    await asyncio.sleep(pause(self._backoff, n))
            self.expect(version, folder)

    async def release_memory(self) -> None:
        """All servers end what they still do and give up the accelerators' memory.  Nothing may be asked of them
        until `resume_memory`.  One that is away gets no requests until it is back and has the weights."""
        self._lent = True
        await self._on_all(self._control.release_memory)

    async def resume_memory(self) -> None:
        """All servers take the memory again; their weights may have to be loaded anew."""
        await self._on_all(self._control.resume_memory)
        self._lent = False

    async def _on_all(self, do: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        async def on(server: Server) -> None:
            try:
                await self._on_workers(server, do)
            except Failed as error:
                self._pool.failed(server, error, allowed=1)

        await _all(map(on, self._pool.servers))

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        if not token_ids:
            raise ValueError("no tokens given; an input has at least 1")
        if min(token_ids) < 0 or (self.vocab_size is not None and max(token_ids) >= self.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {self.vocab_size}")
        return list(token_ids)

    async def _request(
        self, body: dict[str, Any], read: Callable[[dict[str, Any]], tuple[T, int]], session: str = ""
    ) -> T | None:
        """What `read` makes of the first answer that can be used; None if the context has no room for a token."""
        patience, broken, failed = Patience(self._patience), 0, set[Server]()
        for n in itertools.count(1):
            try:
                async with self._pool.slot(session, patience, failed) as server:
                    try:
                        with patience.spent():
                            result = await self._try(server, body, read, session, min(self._timeout, patience.left))
                        self._pool.answered(server)
                        self.statistics.requests += 1
                        return result
                    except Failed as error:
                        failure = error
                        if not isinstance(error, Stale):
                            self._pool.failed(server, error)
                            failed.add(server)
            except TimeoutError as error:
                raise self._no_answer() from error
            broken += isinstance(failure, Broken)
            if broken == TRIES:
                raise SGLangError(f"{failure} ({TRIES} tries)") from failure
            self.statistics.retries += 1
            with patience.spent():
                await asyncio.sleep(min(pause(self._backoff, n), max(patience.left, 0)))
            if patience.left <= 0:
                raise self._no_answer() from failure
        raise AssertionError

    async def _try(
        self, server: Server, body: dict[str, Any], read: Callable[[dict[str, Any]], tuple[T, int]], session: str,
        seconds: float,
    ) -> T | None:  # fmt: skip
        expected = self._expected
        await self._workers(server)
        parameters = body["sampling_params"]
        if wanted := parameters["max_new_tokens"]:
            given, context = len(body["input_ids"]), min(server.context, self.context or server.context)
            if given > min(server.max_input, context - 1):
                return None
            parameters = parameters | {"max_new_tokens": min(wanted, context - given)}
        rid = uuid.uuid4().hex
        url, headers = f"{server.url}/generate", {SESSION_HEADER: quote(session)} if session else None
        try:
            sent = body | {"sampling_params": parameters, "rid": rid}
            answer = await self._http.ask("POST", url, sent, headers, seconds=seconds)
        except (asyncio.CancelledError, TimedOut):
            self._abort(server, rid)
            raise
        try:
            result, oldest = read(answer["meta_info"])
        except (LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise Broken(f"{url} did not answer as SGLang does ({said}): {answer!r:.300}") from error
        if isinstance(result, Completion) and result.finish == "abort" and not self._lent:
            raise Unavailable(f"{url}: somebody else has aborted the request")
        if expected and oldest < expected[0]:
            self.statistics.stale += 1
            await self._bring_up_to_date(server)
            raise Stale(f"{url} answered with weights older than version {expected[0]}, which it was given")
        return result

    def _abort(self, server: Server, rid: str) -> None:
        self.statistics.aborted += 1
        aborting = asyncio.gather(*(self._control.abort(worker, rid) for worker in server.workers or [server]))
        self._aborting.add(aborting)
        aborting.add_done_callback(self._aborting.discard)

    async def _workers(self, server: Server) -> list[Server]:
        """The servers that hold the weights: itself, or a router's as they were at the last survey."""
        if server.workers is None:
            async with server.surveying:
                if server.workers is None:
                    await self._survey(server)
        return server.workers or []

    async def _survey(self, server: Server) -> None:
        await self._control.survey(server)
        server.slots = self._concurrency * len(server.workers or ())

    async def _load(self, server: Server, version: int, folder: str) -> None:
        """New weights on the server, or on those of a router's workers that can be reached; if none can, it is down."""

        async def load(worker: Server) -> None:
            async with worker.lock:
                await self._control.load(worker, version, folder)

        try:
            if server.workers != [server]:
                await self._survey(server)  # a router may have other workers now
            await self._on_workers(server, load)
        except Failed as error:
            self._pool.failed(server, error, allowed=1)
            raise

    async def _bring_up_to_date(self, server: Server) -> None:
        """Give the expected weights to the server, or to its workers, unless they have them by now."""

        async def refresh(worker: Server) -> None:
            async with worker.lock:
                if self._expected and await self._control.version(worker) < self._expected[0]:
                    await self._control.load(worker, *self._expected)
                    self.statistics.brought_up_to_date += 1

        await self._on_workers(server, refresh)

    async def _on_workers(self, server: Server, do: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """On all that can be reached; one of their `Failed` if none can."""
        workers = await self._workers(server)
        failed = await _all(do(worker) for worker in workers)
        if len(failed) == len(workers):
            raise failed[0]

    async def _revive(self, server: Server) -> None:
        """Raises SGLangError unless the server is well and has the weights expected of it."""
        try:
            await self._control.check_health(server)
        except Failed:
            for worker in await self._workers(server):  # an update that was killed leaves a server paused
                async with worker.lock:
                    await self._control.unpause(worker)
            raise
        await self._survey(server)  # it may have been started anew, with other limits
        await self._bring_up_to_date(server)

    def _no_answer(self) -> SGLangError:
        said = "; ".join(f"{server.url} ({server.said})" for server in self._pool.servers)
        return SGLangError(
            f"no SGLang server gave an answer within {self._patience:g} s: {said}; start them again, or raise patience"
        )


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> list[Failed]:
    """Do all of it to the end; the errors that may pass.  Others are raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Failed):
            raise result
    return [result for result in results if isinstance(result, Failed)]
