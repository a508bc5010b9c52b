"""What a rollout leaves behind: questions, tool calls, segments, trajectories and groups of them.

All of it is immutable, checked when it is made, and goes through JSON unchanged.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from etagent_jax import protocol

QuestionKind = Literal["mathematics", "qa"]
Source = Literal["model", "reviser", "program", "tool"]
CallStatus = Literal["ok", "error", "timeout", "refused", "empty", "unavailable"]
Finish = Literal["answer", "stop", "length", "budget", "malformed", "timeout", "abort"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Question:
    """kind decides how the answer is scored; category is what reports group by (a set's or task's name)."""

    id: str
    text: str
    answers: tuple[str, ...]
    kind: QuestionKind
    category: str

    def __post_init__(self) -> None:
        _require(bool(self.id), "a question needs an id")
        _require(bool(self.text.strip()), f"question {self.id}: the text is empty")
        _require(bool(self.answers) and all(self.answers), f"question {self.id}: needs at least one answer, none empty")
        _require(self.kind in ("mathematics", "qa"), f"question {self.id}: kind {self.kind!r} is not mathematics or qa")

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "answers": list(self.answers), "kind": self.kind,
                "category": self.category}  # fmt: skip

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(row["id"], row["text"], tuple(row["answers"]), row["kind"], row["category"])


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool said.  Only `ok` is a success; `detail` is for people and is never shown to the model."""

    output: str
    status: CallStatus
    seconds: float = 0.0
    cached: bool = False
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status != "ok"


@dataclass(frozen=True, slots=True)
class ToolCall:
    tool: str
    input: str
    result: ToolResult

    def to_json(self) -> dict[str, Any]:
        r = self.result
        return {"tool": self.tool, "input": self.input, "output": r.output, "status": r.status,
                "seconds": r.seconds, "cached": r.cached, "detail": r.detail}  # fmt: skip

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        result = ToolResult(row["output"], row["status"], row["seconds"], row["cached"], row["detail"])
        return cls(row["tool"], row["input"], result)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one author.

    source: `model` (sampled by the policy), `reviser` (written by the flywheel's reviser in the
    model's place), `program` (forced: a hint, a closing tag) or `tool` (a result, with its call).
    logprobs, weight_versions: one for each token of a model segment, empty for others.
    text: the tokens decoded, for people and for parsing; tokens are never made from it again.
    """

    source: Source
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()
    weight_versions: tuple[int, ...] = ()
    call: ToolCall | None = None

    def __post_init__(self) -> None:
        n = len(self.token_ids) if self.source == "model" else 0
        _require(n > 0 or self.source != "model", "a model segment needs at least one token")
        _require(len(self.logprobs) == n, f"{self.source} segment: {len(self.logprobs)} log-probabilities, needs {n}")
        _require(len(self.weight_versions) == n,
                 f"{self.source} segment: {len(self.weight_versions)} weight versions, needs {n}")  # fmt: skip
        _require((self.call is not None) == (self.source == "tool"), "tool segments, and only they, carry a call")

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"source": self.source, "token_ids": list(self.token_ids), "text": self.text}
        if self.source == "model":
            row["logprobs"] = list(self.logprobs)
            row["weight_versions"] = [[v, len(list(run))] for v, run in itertools.groupby(self.weight_versions)]
        if self.call is not None:
            row["call"] = self.call.to_json()
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        versions = tuple(v for v, count in row.get("weight_versions", ()) for _ in range(count))
        call = ToolCall.from_json(row["call"]) if "call" in row else None
        return cls(row["source"], tuple(row["token_ids"]), row["text"], tuple(row.get("logprobs", ())), versions, call)


@dataclass(frozen=True, slots=True)
class Origin:
    """How a trajectory was made out of another: from which parent, by which operator, at which of its steps."""

    parent: str
    operator: str
    step: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Trajectory:
    """One attempt at a question: the prompt's tokens, then segments, token for token as they were served.

    id: unique within a run.  seed: of its sampling.  tools: the names of the tools it was offered.
    finish: why it ended.  seconds: wall time from first to last token.
    """

    id: str
    question: Question
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    finish: Finish
    seed: int
    temperature: float
    tools: tuple[str, ...]
    seconds: float = 0.0
    origin: Origin | None = field(default=None)

    def __post_init__(self) -> None:
        _require(bool(self.prompt_ids), f"trajectory {self.id}: the prompt is empty")
        _require(bool(self.segments), f"trajectory {self.id}: needs at least one segment")
        _require(self.segments[0].source != "tool", f"trajectory {self.id}: starts with a tool result")
        for before, after in itertools.pairwise(self.segments):
            _require(not (before.source == after.source == "tool"), f"trajectory {self.id}: two results in a row")
        for segment in self.segments:
            if segment.call is not None:
                _require(segment.call.tool in self.tools, f"trajectory {self.id}: unknown tool {segment.call.tool!r}")

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and segments: the sequence that was served, and that is trained on."""
        return self.prompt_ids + tuple(itertools.chain.from_iterable(s.token_ids for s in self.segments))

    @cached_property
    def turns(self) -> tuple[str, ...]:
        """What was written between tool results, as `protocol` reads it."""
        texts = [""]
        for segment in self.segments:
            if segment.source == "tool":
                texts.append("")
            else:
                texts[-1] += segment.text
        return tuple(texts)

    @cached_property
    def steps(self) -> tuple[tuple[Segment, ...], ...]:
        """Segments up to and including each tool result; what follows the last one is the last step."""
        steps: list[list[Segment]] = [[]]
        for segment in self.segments:
            steps[-1].append(segment)
            if segment.source == "tool":
                steps.append([])
        return tuple(tuple(step) for step in steps if step)

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(segment.call for segment in self.segments if segment.call is not None)

    @property
    def model_tokens(self) -> int:
        """Tokens written in the assistant's voice: all but tool results and what the program forced."""
        return sum(len(s.token_ids) for s in self.segments if s.source in ("model", "reviser"))

    @cached_property
    def answer(self) -> str | None:
        return protocol.extract_answer(self.turns) if self.finish == "answer" else None

    @property
    def has_void_turn(self) -> bool:
        """Whether a turn holds neither a call nor an answer (SimpleTIR, arXiv 2509.02479).

        That can only be the last one, for each of the others ended in the call whose result follows it.
        Where nothing was written after the last result, there is no such turn.
        """
        written = any(segment.source in ("model", "reviser") for segment in self.steps[-1])
        called = self.segments[-1].source == "tool" or protocol.ending_call(self.turns[-1], self.tools) is not None
        return written and not called and self.answer is None

    @cached_property
    def format_error(self) -> str | None:
        return protocol.format_error(self.turns, self.tools)

    def to_json(self) -> dict[str, Any]:
        row = {
            "id": self.id, "question": self.question.to_json(), "prompt_ids": list(self.prompt_ids),
            "segments": [segment.to_json() for segment in self.segments], "finish": self.finish, "seed": self.seed,
            "temperature": self.temperature, "tools": list(self.tools), "seconds": self.seconds,
        }  # fmt: skip
        if self.origin is not None:
            o = self.origin
            row["origin"] = {"parent": o.parent, "operator": o.operator, "step": o.step, "note": o.note}
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(
            id=row["id"], question=Question.from_json(row["question"]), prompt_ids=tuple(row["prompt_ids"]),
            segments=tuple(Segment.from_json(s) for s in row["segments"]), finish=row["finish"], seed=row["seed"],
            temperature=row["temperature"], tools=tuple(row["tools"]), seconds=row["seconds"],
            origin=Origin(**row["origin"]) if "origin" in row else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Trajectories of one question, sampled to be compared with one another."""

    question: Question
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        _require(bool(self.trajectories), f"group of question {self.question.id}: no trajectories")
        _require(all(t.question == self.question for t in self.trajectories),
                 f"group of question {self.question.id}: holds a trajectory of another question")  # fmt: skip
        ids = {t.id for t in self.trajectories}
        _require(len(ids) == len(self.trajectories), f"group of question {self.question.id}: a trajectory id repeats")
