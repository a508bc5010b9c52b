"""The embedded engine: continuous batching of one JAX model over fixed slots.

One thread owns the device: it admits requests to slots, runs the compiled loop for a while, hands
finished completions back, and in between scores given tokens and does what it is called to: take new
weights, abort, pause.  What a slot has cached stays after its request ends, so the next turn of the
trajectory, or another rollout of the same prompt, begins where the whole chunks of the common prefix end.
"""

import asyncio
import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from etagent_jax.model.folder import check_vocabulary
from etagent_jax.model.transformer import ModelConfig, Transformer
from etagent_jax.policy import decoding
from etagent_jax.policy.interface import Completion, Finish, Sampling, Scores
from etagent_jax.policy.prefixes import Prefixes
from etagent_jax.policy.stops import StopTable, check_stops
from etagent_jax.tokenizer import Tokenizer

PauseMode = Literal["abort", "in_place", "retract"]

T = TypeVar("T")


class EngineStopped(RuntimeError):
    """The engine is closed, or its thread has failed; the message says which."""


@dataclass(eq=False)
class _Request:
    token_ids: np.ndarray
    sampling: Sampling
    session: str
    id: str
    future: "Future[Completion]"
    cached: int = 0
    versions: list[tuple[int, int]] = field(default_factory=list)  # (first token index, weight version)


@dataclass
class EngineStatistics:
    """Tokens since the start: sampled, forced through the model, and found in a cached prefix."""

    sampled: int = 0
    computed: int = 0
    reused: int = 0


def check_fit(config: ModelConfig, tokenizer: Tokenizer, context: int, where: str | Path) -> None:
    """ValueError, naming `where`, if a model cannot be served with this tokenizer, or so long a context."""
    check_vocabulary(config, tokenizer.vocab_size, where)
    if context > config.max_position:
        raise ValueError(f"{where}: context {context} exceeds the model's {config.max_position} positions")


class Engine:
    """A Policy over a `Transformer` in this process.

    slots: sequences generated side by side.  context: most tokens of one sequence.
    chunk: given tokens are prefilled so many at a time; fewer than that go through the decode loop.
    All lies on this process's first device.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, slots: int = 128, context: int = 256, chunk: int = 16
    ):
        check_fit(model.config, tokenizer, context, "engine")
        vocab = model.config.vocab_size
        self.config, self.context, self.slots = model.config, context, slots
        self.statistics = EngineStatistics()
        self._device = jax.local_devices()[0]
        self._model, self._version = jax.device_put(model, self._device), 0
        self._chunk = chunk
        self._cache = jax.device_put(model.empty_cache(slots, context), self._device)
        self._slots = decoding.Slots.empty(slots, context)
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] + [""] * (vocab - tokenizer.vocab_size)
        self._stops = StopTable(texts)
        self._vocab = vocab
        self._is_eos = jax.numpy.asarray(np.isin(np.arange(vocab), tokenizer.eos_ids))
        self._stop_arrays = decoding.StopArrays(self._stops.table, self._stops.accepts, self._is_eos)
        self._requests: dict[int, _Request] = {}
        self._prefixes = Prefixes(slots, chunk)
        self._queue: collections.deque[_Request] = collections.deque()
        self._scorings: collections.deque[tuple[np.ndarray, Future[Scores]]] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._paused: PauseMode | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """Of the weights served now."""
        return self._version

    @property
    def closed(self) -> bool:
        """True once requests are no longer taken: after `close`, or because the thread has failed."""
        return self._closed

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, session: str = "", request_id: str = ""
    ) -> Completion:
        """Continue `token_ids`; `request_id` is what `abort` knows this by.

        ValueError if the ids are empty, leave no room, or hold an unknown one, or if a stop string is not ASCII.
        """
        ids = self._checked(token_ids, self.context - 1)
        check_stops(sampling.stop)
        future: Future[Completion] = Future()
        future.add_done_callback(self._notice_if_cancelled)
        self._post(lambda: self._queue.append(_Request(ids, sampling, session, request_id, future)))
        return await asyncio.wrap_future(future)

    async def score(self, token_ids: Sequence[int]) -> Scores:
        """The log-probability of each of `token_ids` but the first, given those before it, at temperature 1.

        ValueError if they are empty, more than the context, or hold an unknown id.
        """
        ids = self._checked(token_ids, self.context)
        future: Future[Scores] = Future()
        self._post(lambda: self._scorings.append((ids, future)))
        return await asyncio.wrap_future(future)

    async def update_weights(self, version: int, weights: nnx.State) -> None:
        """Serve `weights` from now on, cast to the dtype and brought to the device of those served.

        Nothing cached under the old ones is used again: sequences in progress go on, their prefix
        computed anew.  An array that needs no cast is kept, not copied: it must not be donated
        afterwards.  ValueError if they are not of this model's names and shapes.
        """
        if _shapes(weights) != _shapes(nnx.state(self._model)):
            raise ValueError(f"weights of version {version} differ in names or shapes from this model's")
        dtype = self.config.param_dtype
        weights = jax.tree.map(lambda x: jax.device_put(x.astype(dtype), self._device), weights)
        await self._call(lambda: self._replace_weights(version, weights))

    async def abort(self, request_id: str | None) -> None:
        """End the request of that id, or all for None: each returns what it has, with finish `abort`."""
        await self._call(lambda: self._abort(request_id))

    async def pause(self, mode: PauseMode) -> None:
        """Sample nothing until `resume`; new requests wait, while scores and new weights are still taken.

        Open requests end as by `abort`, or stay and go on afterwards: with what they have cached
        (`in_place`), or letting `flush_cache` have it (`retract`).
        """
        await self._call(lambda: self._pause(mode))

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._call(lambda: self._pause(None))

    async def flush_cache(self) -> bool:
        """Use nothing again that is cached now; False, and nothing done, while requests run that need it."""
        return await self._call(self._flush)

    def close(self) -> None:
        """Stop the thread; requests still open are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _checked(self, token_ids: Sequence[int], most: int) -> np.ndarray:
        """The ids [n] int32, if they are 1 to `most` of the vocabulary."""
        if not 0 < len(token_ids) <= most:
            raise ValueError(f"{len(token_ids)} tokens given; an input has 1 to {most}")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab:
            raise ValueError(f"a token id is outside the vocabulary of {self._vocab}")
        return np.asarray(token_ids, np.int32)

    def _post(self, enqueue: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is not None:
                raise EngineStopped("the engine's thread has failed") from self._failure
            if self._closed:
                raise EngineStopped("the engine is closed")
            enqueue()
            self._wake.notify()

    async def _call(self, do: Callable[[], T]) -> T:
        """What `do` returns when the thread does it, between two runs of the loop."""
        future: Future[T] = Future()
        self._post(lambda: self._calls.append((do, future)))
        return await asyncio.wrap_future(future)

    def _notice_if_cancelled(self, future: Future) -> None:
        if future.cancelled():
            with self._wake:
                self._calls.append((self._drop_cancelled, Future()))
                self._wake.notify()

    def _has_work(self) -> bool:
        runs = self._paused is None and (self._queue or self._busy())
        return bool(self._closed or self._calls or self._scorings or runs)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(self._has_work)
                    if self._closed:
                        break
                while self._calls:
                    do, future = self._calls[0]
                    result = do()
                    self._calls.popleft()
                    _resolve(future, result)
                if self._scorings:
                    self._score_next()
                if self._paused is None:
                    self._admit()
                    if self._busy():
                        self._advance()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._release_all()

    def _release_all(self) -> None:
        """Let nobody wait for a thread that has ended."""
        with self._wake:
            self._closed = True
            waiting: list[Future] = [r.future for r in (*self._queue, *self._requests.values())]
            waiting += [call[-1] for call in self._calls] + [scoring[-1] for scoring in self._scorings]
        for future in waiting:
            if self._failure is None:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_exception(EngineStopped(f"the engine's thread has failed: {self._failure!r}"))

    def _replace_weights(self, version: int, weights: nnx.State) -> None:
        graph, _ = nnx.split(self._model)
        self._model, self._version = nnx.merge(graph, weights), version
        self._forget_cache()
        for slot, request in self._requests.items():
            request.versions.append((int(self._slots.known[slot]), version))

    def _forget_cache(self) -> None:
        """The loop fills the slots that are active from their first token on."""
        self._slots.position[:] = 0
        self._prefixes.forget()

    def _flush(self) -> bool:
        free = self._paused == "retract" or not self._busy()
        if free:
            self._forget_cache()
        return free

    def _pause(self, mode: PauseMode | None) -> None:
        self._paused = mode
        if mode == "abort":
            self._abort(None)

    def _abort(self, request_id: str | None) -> None:
        chosen = lambda request: request_id is None or request.id == request_id
        for slot in [slot for slot, request in self._requests.items() if chosen(request)]:
            self._finish(slot, "abort")
        for request in self._withdraw(chosen):
            _resolve(request.future, Completion((), (), "abort", ()))

    def _withdraw(self, chosen: Callable[[_Request], bool]) -> list[_Request]:
        """Take the waiting requests that are `chosen` out of the queue."""
        with self._wake:
            waiting = [(request, chosen(request)) for request in self._queue]
            self._queue = collections.deque(request for request, out in waiting if not out)
        return [request for request, out in waiting if out]

    def _score_next(self) -> None:
        """Score the sequence that has waited longest, so that many of them do not hold up the others."""
        ids, future = self._scorings[0]
        if not future.cancelled():
            at_once = decoding.SCORED_AT_ONCE
            tokens = np.zeros(-(-self.context // at_once) * at_once + 1, np.int32)
            tokens[: len(ids)] = ids
            logprobs = np.asarray(decoding.score(self._model, tokens, np.int32(len(ids))))
            _resolve(future, Scores(tuple(logprobs[: len(ids) - 1].tolist()), self._version))
        self._scorings.popleft()

    def _busy(self) -> bool:
        return bool(self._slots.active.any())

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, request in self._requests.items() if request.future.cancelled()]:
            self._slots.active[slot] = False
            del self._requests[slot]
        self._withdraw(lambda request: request.future.cancelled())

    def _admit(self) -> None:
        """Give waiting requests to free slots, as long as there are both."""
        while self._queue and not self._slots.active.all():
            if not self._queue[0].future.cancelled():
                self._place(self._queue[0])
            self._queue.popleft()

    def _place(self, request: _Request) -> None:
        s, ids, n = self._slots, request.token_ids, len(request.token_ids)
        source, slot, start = self._prefixes.find(ids, s.tokens, s.active, request.session)
        if start and source != slot:
            self._cache = decoding.copy_slot(self._cache, source, slot)
        self.statistics.reused += start
        s.tokens[slot, :n] = ids
        end = (n - 1) // self._chunk * self._chunk
        if start < end:
            tokens = s.tokens[slot].copy()
            self._cache = decoding.prefill(self._model, self._cache, slot, tokens, start, end, self._chunk)
            self.statistics.computed += end - start
        self._prefixes.hold(slot, end, request.session)
        request.cached = start
        sampling = request.sampling
        s.position[slot], s.known[slot] = end, n
        s.limit[slot] = min(n + sampling.max_new_tokens, self.context)
        s.active[slot], s.stopped[slot] = True, False
        s.stop_state[slot] = self._stop_state(sampling.stop)
        s.temperature[slot], s.top_p[slot] = sampling.temperature, sampling.top_p
        s.seed[slot] = sampling.seed & 0xFFFFFFFF
        request.versions.append((n, self._version))
        self._requests[slot] = request

    def _stop_state(self, stops: tuple[str, ...]) -> int:
        """Where the automaton of `stops` starts; its table goes to the device when it is new.

        A full table forgets what no slot is using before it grows: a larger one is compiled for anew.
        """
        if stops in self._stops:
            return self._stops.start(stops)
        if not self._stops.fits(stops):
            states = self._slots.stop_state
            running = {slot: request.sampling.stop for slot, request in self._requests.items()}
            within = {slot: states[slot] - self._stops.start(own) for slot, own in running.items()}
            self._stops.clear()
            for slot, own in running.items():
                states[slot] = self._stops.start(own) + within[slot]
        start = self._stops.start(stops)
        table, accepts = jax.device_put((self._stops.table, self._stops.accepts))
        self._stop_arrays = decoding.StopArrays(table, accepts, self._is_eos)
        return start

    def _advance(self) -> None:
        """Run the compiled loop once and hand back what it finished."""
        before = self._slots
        running = np.flatnonzero(before.active)
        self._cache, after = decoding.decode(
            self._model, self._cache, before, self._stop_arrays, np.int32(max(1, len(running) // 8)), max_steps=64
        )
        self._slots = jax.tree.map(np.array, after)
        s = self._slots
        self.statistics.computed += int((s.position - before.position).sum())
        self.statistics.sampled += int((s.known - before.known)[running].sum())
        for slot in map(int, running[~s.active[running]]):
            self._finish(slot, "stop" if s.stopped[slot] else "length")

    def _finish(self, slot: int, finish: Finish) -> None:
        """Hand back what the slot's request has, and free the slot."""
        s, request = self._slots, self._requests[slot]
        start, end = len(request.token_ids), int(s.known[slot])
        starts = [first for first, _ in request.versions] + [end]
        versions = [
            v for (first, v), last in zip(request.versions, starts[1:], strict=True) for _ in range(first, last)
        ]
        completion = Completion(
            tuple(s.tokens[slot, start:end].tolist()), tuple(s.logprobs[slot, start:end].tolist()), finish,
            tuple(versions), request.cached,
        )  # fmt: skip
        s.active[slot] = False
        del self._requests[slot]
        _resolve(request.future, completion)


def _resolve(future: "Future[T]", result: T) -> None:
    """Give the result to whoever still waits for it."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _shapes(weights: nnx.State) -> dict:
    """Shape of each parameter by its path."""
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(weights)}
