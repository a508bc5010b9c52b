"""One rollout: an agent writes, calls tools, reads their results, and answers, within a budget."""

import asyncio
import copy
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from etagent_jax import protocol
from etagent_jax.policy.interface import Policy, Sampling
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.tools.interface import Tool
from etagent_jax.trajectory import Finish, Origin, Question, Segment, ToolCall, ToolResult, Trajectory

NO_CALLS_LEFT = "no calls left"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one trajectory may use.

    calls_per_tool, calls: of one tool, and of all.  context: tokens, the prompt and tool results
    included.  seconds: of wall time.
    """

    calls_per_tool: int
    calls: int
    context: int
    seconds: float

    def __post_init__(self) -> None:
        for field, least in (("calls_per_tool", 0), ("calls", 0), ("context", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"budget: {field} must be at least {least}, got {getattr(self, field)}")
        if not self.seconds > 0:
            raise ValueError(f"budget: seconds must be positive, got {self.seconds}")


class Agent:
    """A policy that may call tools.  tools: by name, which is also their tag."""

    def __init__(
        self, policy: Policy, tokenizer: Tokenizer, tools: Mapping[str, Tool], system_prompt: str, budget: Budget
    ):
        for name, tool in tools.items():
            if name != tool.name or name in protocol.RESERVED:
                raise ValueError(f"agent: tool {tool.name!r} cannot be called {name!r}")
        tokenizer.check_writes(protocol.tags(tools))
        self.policy, self.tokenizer, self.tools, self.budget = policy, tokenizer, dict(tools), budget
        self.system_prompt = system_prompt
        self._stops = protocol.stop_strings(tools)
        self._prompt = functools.lru_cache(maxsize=1024)(functools.partial(tokenizer.prompt, system_prompt))

    def with_budget(self, budget: Budget) -> Self:
        """The same agent within another budget."""
        other = copy.copy(self)
        other.budget = budget
        return other

    async def rollout(
        self, question: Question, *, id: str, seed: int, temperature: float, top_p: float = 1.0,
        prefix: Sequence[Segment] = (), origin: Origin | None = None,
        on_turn: Callable[[Sequence[Segment]], None] = lambda _: None,
    ) -> Trajectory:  # fmt: skip
        """Sample one trajectory, which starts with the segments of `prefix`, token for token.

        A prefix whose text ends in a call has that call made first; its calls count against the
        budget.  `on_turn` is called after each completion that holds a token, before its call is made,
        with all segments so far, of which it is the last.  How the trajectory can finish:

        - `answer`: the model closed an `<answer>`;
        - `stop`: it ended its turn without one;
        - `malformed`: it closed a tool tag that it had not opened;
        - `budget`: a call beyond the budget is refused, in place of a result, and once more the model
          may go on; the second refused call ends the trajectory, its refusal appended;
        - `length`: the context is full; a result that does not fit is left out whole, and the
          trajectory ends with the call that asked for it;
        - `timeout`: the wall time is over; what was complete by then is kept;
        - `abort`: the policy gave up.

        If nothing at all was written, the one segment is an empty one of the program's.  Raises
        ValueError if the prompt alone fills the context.  Errors of policy and tools propagate.
        """
        start = time.perf_counter()
        prompt_ids = self._prompt(question.text)
        if len(prompt_ids) >= self.budget.context:
            raise ValueError(
                f"question {question.id}: the prompt has {len(prompt_ids)} tokens and the context only "
                f"{self.budget.context}; raise the context or leave the question out"
            )
        segments = list(prefix)
        sampling = Sampling(temperature, self.budget.context, self._stops, top_p, seed)
        finish: Finish = "timeout"
        try:
            async with asyncio.timeout(self.budget.seconds) as limit:
                finish = await self._write(prompt_ids, segments, sampling, id, on_turn)
        except TimeoutError:
            if not limit.expired():
                raise
        return Trajectory(
            id=id, question=question, prompt_ids=prompt_ids,
            segments=tuple(segments) or (Segment("program", (), ""),), finish=finish, seed=seed,
            temperature=temperature, tools=tuple(self.tools), seconds=time.perf_counter() - start, origin=origin,
        )  # fmt: skip

    async def _write(
        self, prompt_ids: tuple[int, ...], segments: list[Segment], sampling: Sampling, session: str,
        on_turn: Callable[[Sequence[Segment]], None],
    ) -> Finish:  # fmt: skip
        """Append to `segments`, turn by turn, until the trajectory is finished; return why it is."""
        token_ids = list(prompt_ids)
        turn = ""
        for segment in segments:
            token_ids.extend(segment.token_ids)
            turn = "" if segment.source == "tool" else turn + segment.text
        stopped = self._through_stop(turn.rstrip(), 1)
        while True:
            if stopped is None:
                room = self.budget.context - len(token_ids)
                if room < 1:
                    return "length"
                completion = await self.policy.generate(
                    tuple(token_ids), dataclasses.replace(sampling, max_new_tokens=room), session
                )
                text = self.tokenizer.decode(completion.token_ids)
                if completion.token_ids:
                    segments.append(
                        Segment("model", completion.token_ids, text, completion.logprobs, completion.weight_versions)
                    )
                    token_ids.extend(completion.token_ids)
                    turn += text
                    on_turn(segments)
                if completion.finish != "stop":
                    return completion.finish
                stopped = self._through_stop(turn, len(text))
                if stopped is None:
                    return "stop"
            if stopped.endswith(protocol.closing(protocol.ANSWER)):
                return "answer"
            ending = protocol.ending_call(stopped, self.tools)
            if ending is None:
                return "malformed"
            calls = [segment.call for segment in segments if segment.call is not None]
            segment = await self._call(*ending, calls)
            if len(token_ids) + len(segment.token_ids) > self.budget.context:
                return "length"
            segments.append(segment)
            token_ids.extend(segment.token_ids)
            if _refused(segment.call) and any(map(_refused, calls)):
                return "budget"
            turn, stopped = "", None

    def _through_stop(self, turn: str, new: int) -> str | None:
        """`turn` up to the last stop string that ends within its last `new` characters; None without one.

        The token that completes a stop string may hold more characters after it.
        """
        end = max(turn.rfind(stop) + len(stop) if stop in turn else 0 for stop in self._stops)
        return turn[:end] if end and end > len(turn) - new else None

    async def _call(self, tool: str, input: str, before: Sequence[ToolCall]) -> Segment:
        """Make the call, or refuse it if those made `before` used up the budget; return its result."""
        made = Counter(call.tool for call in before if not _refused(call))
        if made[tool] >= self.budget.calls_per_tool or made.total() >= self.budget.calls:
            result = ToolResult(NO_CALLS_LEFT, "refused")
        else:
            result = await self.tools[tool].run(input)
        output = protocol.neutralise(result.output, self.tools, self.tokenizer.special_tokens)
        token_ids = self.tokenizer.encode(protocol.render_result(output))
        return Segment("tool", token_ids, self.tokenizer.decode(token_ids), call=ToolCall(tool, input, result))


def _refused(call: ToolCall | None) -> bool:
    return call is not None and call.result.status == "refused"
