"""The six operators that make a new trajectory out of one that is there.

For a correct base: `re_rollout`, `redundancy_modification`, `global_refinement`; for an incorrect
one: `self_correction`, `step_hint`, `trajectory_hint` (ET-Agent, arXiv 2601.06860).  Each takes the
base, the context, and the id and seed of what it makes, and returns a Trajectory whose `origin`
names base, operator and step (from 1), or a Refusal.  What is kept of the base is kept token for
token, and its tool results with it: no kept call is run again.  What the reviser writes is encoded
once, as a `reviser` segment; a hint is a `program` segment, on which nothing is trained.
"""

import bisect
import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from etagent_jax import protocol
from etagent_jax.chat import Chat, ChatError
from etagent_jax.flywheel import prompts
from etagent_jax.rollout.agent import Agent
from etagent_jax.tokenizer import Tokenizer
from etagent_jax.trajectory import Origin, Segment, Trajectory

T = TypeVar("T")

_OPEN_THINK, _CLOSE_THINK = protocol.opening(protocol.THINK), protocol.closing(protocol.THINK)
_THINK_BLOCK = re.compile(rf"{_OPEN_THINK}(\s*)(.*?)(\s*){_CLOSE_THINK}", re.DOTALL)
_NOT_WRITABLE = "the tokenizer does not give the text back as it was"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operator made nothing; `reason` is one of a few constant sentences, to count by."""

    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Context:
    """What the operators work with.

    agent: makes fresh samples.  continuer: the same policy, tools and prompt, with the larger budget
    of corrected continuations.  hints: whole sentences, one of which is drawn by the seed.
    unparsed: counts the reviser's replies that did not parse, by kind, over the whole run.
    """

    agent: Agent
    continuer: Agent
    reviser: Chat
    hints: tuple[str, ...]
    temperature: float
    top_p: float = 1.0
    unparsed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.agent.system_prompt != self.continuer.system_prompt or set(self.agent.tools) != set(
            self.continuer.tools
        ):
            raise ValueError("flywheel: agent and continuer must have the same system prompt and tools")
        if isinstance(self.hints, str) or not self.hints:
            raise ValueError(f"hints must be a tuple of at least one sentence, got {self.hints!r}")
        for hint in self.hints:
            if " " not in hint.strip() or hint.strip()[-1] not in ".!?:":
                raise ValueError(f"hint {hint!r} is not a whole sentence: it needs several words and an end")


async def re_rollout(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """A fresh sample by the policy."""
    return await context.agent.rollout(
        base.question, id=id, seed=seed, temperature=context.temperature, top_p=context.top_p,
        origin=Origin(base.id, "re_rollout"),
    )  # fmt: skip


async def redundancy_modification(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """The first redundant step replaced by the reviser's, the rest dropped, continued by the policy."""
    return await _replace_step(base, context, id, seed, "redundancy_modification", prompts.REDUNDANCY)


async def self_correction(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """The first flawed step replaced by the reviser's, the rest dropped, continued by the policy."""
    return await _replace_step(base, context, id, seed, "self_correction", prompts.SELF_CORRECTION)


async def global_refinement(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """Every think rewritten by the reviser; calls, results and the answer stay byte for byte.

    The reviser is asked for the thinking alone, so what lies between is never its to change; a turn
    whose thinking changed is encoded anew, whole, and results keep their tokens.
    """
    operator, tokenizer = "global_refinement", context.continuer.tokenizer
    if base.format_error is not None:
        return Refusal(operator, "the base is badly formed")
    blocks = sum(len(_THINK_BLOCK.findall(turn)) for turn in base.turns)
    answer = await _ask(
        context, operator, prompts.messages(prompts.REFINEMENT, base, tokenizer.special_tokens),
        lambda reply: prompts.parse_thinking(reply, blocks, base.tools, tokenizer.special_tokens),
    )  # fmt: skip
    if isinstance(answer, Refusal):
        return answer
    texts = iter(answer)
    segments: list[Segment] = []
    for turn, (written, result) in zip(base.turns, _turns(base.segments), strict=True):
        refined = _THINK_BLOCK.sub(lambda m: f"{_OPEN_THINK}{m[1]}{next(texts)}{m[3]}{_CLOSE_THINK}", turn)
        if refined != turn:
            segment = _write(refined, "reviser", tokenizer)
            if segment is None:
                return Refusal(operator, _NOT_WRITABLE)
            written = (segment,)
        segments += (*written, *result)
    if tuple(segments) == base.segments:
        return Refusal(operator, "no thinking was changed")
    return _finished(base, segments, id, seed, Origin(base.id, operator))


async def step_hint(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """The steps before the flawed one, a think opened with a hint, continued by the policy."""
    operator, tokenizer = "step_hint", context.continuer.tokenizer
    step = await _ask(
        context, operator, prompts.messages(prompts.FLAW_LOCATION, base, tokenizer.special_tokens),
        lambda reply: prompts.parse_location(reply, len(base.steps)),
    )  # fmt: skip
    if isinstance(step, Refusal):
        return step
    if step is None:
        return Refusal(operator, "the reviser found no such step")
    kept = tuple(itertools.chain.from_iterable(base.steps[: step - 1]))
    return await _hint(base, kept, _OPEN_THINK, context, id, seed, Origin(base.id, operator, step))


async def trajectory_hint(base: Trajectory, context: Context, id: str, seed: int) -> Trajectory | Refusal:
    """The answer removed, the last think reopened with a hint, continued by the policy.

    All of an unfinished trajectory is kept, but for a call it broke off.
    """
    kept, lead = reopen(base, context.continuer.tokenizer)
    origin = Origin(base.id, "trajectory_hint", len(base.turns))
    return await _hint(base, kept, lead, context, id, seed, origin)


def cut(segment: Segment, end: int, tokenizer: Tokenizer) -> tuple[Segment | None, str]:
    """The tokens of `segment` that lie wholly before character `end` of its text, None if there are none.

    Also returns the characters between the last such token and `end`: what a token that straddles
    the cut held before it (with byte-pair encodings `.</` is often one token, and `</think>` a
    common place to cut at).
    """
    ids = segment.token_ids
    n = bisect.bisect_right(range(len(ids) + 1), end, key=lambda i: len(tokenizer.decode(ids[:i]))) - 1
    while not segment.text.startswith(text := tokenizer.decode(ids[:n])):
        n -= 1  # token n is a part of a character
    kept = None
    if n > 0:
        kept = dataclasses.replace(segment, token_ids=ids[:n], text=text, logprobs=segment.logprobs[:n],
                                   weight_versions=segment.weight_versions[:n])  # fmt: skip
    return kept, segment.text[len(text) : end]


def reopen(trajectory: Trajectory, tokenizer: Tokenizer) -> tuple[tuple[Segment, ...], str]:
    """What to keep so that the last turn's thinking can go on, and what must be written before it does.

    The turn is cut before the `</think>` of its last think, or before whatever follows a think that
    is still open; a turn without a think is cut before its first tag, and a think must be opened.
    """
    *before, (written, _) = _turns(trajectory.segments)
    kept = [segment for turn in before for segment in itertools.chain(*turn)]
    text = trajectory.turns[-1].split(tokenizer.decode(tokenizer.eos_ids[:1]))[0]
    opened, closed = text.rfind(_OPEN_THINK), text.rfind(_CLOSE_THINK)
    if closed > opened:
        end, lead = closed, ""
    else:
        others = "|".join(map(re.escape, (protocol.ANSWER, protocol.RESULT, *trajectory.tools)))
        tag = re.search(rf"</?(?:{others})>", text[max(opened, 0) :])
        end = max(opened, 0) + tag.start() if tag else len(text)
        lead = "" if opened >= 0 else _OPEN_THINK
    for segment in written:
        if end < len(segment.text):
            part, rest = cut(segment, end, tokenizer)
            return (*kept, *([part] if part else [])), rest + lead
        kept.append(segment)
        end -= len(segment.text)
    return tuple(kept), lead


def _turns(segments: Sequence[Segment]) -> Iterator[tuple[tuple[Segment, ...], tuple[Segment, ...]]]:
    """For each turn what was written, and the result that ended it (none for the last turn)."""
    written: list[Segment] = []
    for segment in segments:
        if segment.source == "tool":
            yield tuple(written), (segment,)
            written = []
        else:
            written.append(segment)
    yield tuple(written), ()


def _write(text: str, source: Literal["reviser", "program"], tokenizer: Tokenizer) -> Segment | None:
    """`text` encoded once, None if its tokens do not spell it."""
    token_ids = tokenizer.encode(text)
    return Segment(source, token_ids, text) if tokenizer.decode(token_ids) == text else None


async def _ask(
    context: Context, operator: str, messages: list[dict[str, str]], parse: Callable[[str], T]
) -> T | Refusal:
    """The reviser's parsed reply; one that does not parse is sent back once, with its fault."""
    for _ in range(2):
        try:
            reply = await context.reviser.complete(messages)
        except ChatError:
            return Refusal(operator, "the reviser could not be reached")
        try:
            return parse(reply)
        except prompts.ReplyError as error:
            context.unparsed[error.kind] += 1
            fault = {"role": "user", "content": f"{error} Reply again, in exactly the form asked for."}
            messages = [*messages, {"role": "assistant", "content": reply}, fault]
    return Refusal(operator, "the reviser's reply did not parse, twice")


async def _replace_step(
    base: Trajectory, context: Context, id: str, seed: int, operator: str, instructions: str
) -> Trajectory | Refusal:
    tokenizer = context.continuer.tokenizer
    revision = await _ask(
        context, operator, prompts.messages(instructions, base, tokenizer.special_tokens),
        lambda reply: prompts.parse_revision(reply, base, tokenizer.special_tokens),
    )  # fmt: skip
    if isinstance(revision, Refusal):
        return revision
    if revision is None:
        return Refusal(operator, "the reviser found no such step")
    written = _write(revision.text, "reviser", tokenizer)
    if written is None:
        return Refusal(operator, _NOT_WRITABLE)
    prefix = (*itertools.chain.from_iterable(base.steps[: revision.step - 1]), written)
    origin = Origin(base.id, operator, revision.step, revision.analysis)
    if protocol.ending_call(revision.text, base.tools) is None:
        return _finished(base, prefix, id, seed, origin)
    return await _continue(base, prefix, context, id, seed, origin)


async def _hint(
    base: Trajectory, kept: tuple[Segment, ...], lead: str, context: Context, id: str, seed: int, origin: Origin
) -> Trajectory | Refusal:
    """`kept`, then a program segment of `lead` and a hint, continued by the policy."""
    hint = random.Random(seed).choice(context.hints)
    before = (kept[-1].text if kept else "") + lead
    space = "" if before.endswith(">") or before[-1:].isspace() or hint[:1].isspace() else " "
    written = _write(lead + space + hint, "program", context.continuer.tokenizer)
    if written is None:
        return Refusal(origin.operator, _NOT_WRITABLE)
    return await _continue(base, (*kept, written), context, id, seed, dataclasses.replace(origin, note=hint.strip()))


async def _continue(
    base: Trajectory, prefix: tuple[Segment, ...], context: Context, id: str, seed: int, origin: Origin
) -> Trajectory:
    return await context.continuer.rollout(
        base.question, id=id, seed=seed, temperature=context.temperature, top_p=context.top_p, prefix=prefix,
        origin=origin,
    )  # fmt: skip


def _finished(base: Trajectory, segments: Sequence[Segment], id: str, seed: int, origin: Origin) -> Trajectory:
    """A trajectory that ends in an answer already."""
    return dataclasses.replace(base, id=id, segments=tuple(segments), finish="answer", seed=seed,
                               temperature=base.temperature, seconds=0.0, origin=origin)  # fmt: skip
