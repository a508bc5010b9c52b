"""What the reviser is asked, and the strict reading of what it answers.

Every request is a system message, one of the texts below, and a user message: the question and the
trajectory's numbered steps.  Steps are counted from 1, in what is shown, in the replies and in
`Origin.step`.  A reply that does not have the form asked for raises a ReplyError.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from etagent_jax import protocol
from etagent_jax.chat import Message
from etagent_jax.trajectory import Trajectory

_STEP_EXPLAINED = """\
An agent answered a question with tools. You see the question and the agent's numbered steps. A step is \
thinking in <think>…</think>, then a call of a tool ({calls}) and its <result>, or, in the last step, the <answer>."""

_REVISION_FORM = """\
Reply in exactly this form:
Step: the number of that step
Analysis: why, in one or two sentences
Corrected step:
<think>short thinking</think> followed by one call ({calls}), or by <answer>…\\boxed{the answer}…</answer>

Write no <result>: the tool will be run. If there is no such step, reply with this line only:
Step: no"""

REDUNDANCY = f"""\
# Task: find the first redundant step
{_STEP_EXPLAINED}

A step is redundant if the agent could do without its call: it repeats an earlier call, asks for what the question \
or an earlier result already says, checks what is already certain, or brings nothing to the answer. Find the first \
redundant step and write the step that should stand in its place, given only the question and the steps before it.

{_REVISION_FORM}
"""

SELF_CORRECTION = f"""\
# Task: find the first flawed step and correct it
{_STEP_EXPLAINED}

The agent's answer is wrong, or missing. Find the first flawed step: wrong reasoning, a call that fails or asks for \
the wrong thing, a call that was needed and left out, or a wrong answer. Write the step that should stand in its \
place, given only the question and the steps before it.

{_REVISION_FORM}
"""

FLAW_LOCATION = f"""\
# Task: find the first flawed step
{_STEP_EXPLAINED}

The agent's answer is wrong, or missing. Find the first flawed step: wrong reasoning, a call that fails or asks for \
the wrong thing, a call that was needed and left out, or a wrong answer.

Reply in exactly this form:
Step: the number of that step
Analysis: why, in one or two sentences

If there is no such step, reply with this line only:
Step: no
"""

REFINEMENT = f"""\
# Task: rewrite the thinking
{_STEP_EXPLAINED}

The agent's answer is right. Rewrite the text inside every <think>…</think> so that it is short and clear and leads \
to what follows it; calls, results and the answer stay as they are. Number the think blocks from 1 in the order \
in which they stand, and reply with the new text of every one, without tags, in exactly this form:
Think 1: the new text of the first think block
Think 2: the new text of the second think block
"""


class ReplyError(ValueError):
    """A reply that is not in the form asked for.

    kind: a short constant name to count by; the message tells the reviser what is wrong.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Revision:
    """A step (from 1) to be replaced, why, and the text of the new one: thinking, then one call or the answer."""

    step: int
    analysis: str
    text: str


def step_texts(trajectory: Trajectory) -> list[str]:
    """The text of each step, results included."""
    return ["".join(segment.text for segment in step) for step in trajectory.steps]


def messages(instructions: str, trajectory: Trajectory, special_tokens: Sequence[str] = ()) -> list[Message]:
    """The request: `instructions` (a constant of this module) about `trajectory`, its special tokens left out."""
    calls = " or ".join(f"{protocol.opening(tool)}…{protocol.closing(tool)}" for tool in trajectory.tools)
    steps = [f"### Step {number}\n{text}" for number, text in enumerate(step_texts(trajectory), start=1)]
    shown = "\n\n".join([f"Question:\n{trajectory.question.text}", *steps])
    for token in special_tokens:
        shown = shown.replace(token, "")
    return [
        {"role": "system", "content": instructions.replace("{calls}", calls)},
        {"role": "user", "content": shown},
    ]


def parse_location(reply: str, steps: int) -> int | None:
    """The step (1 … `steps`) that the reply names, None if it says "Step: no"."""
    lines = re.findall(r"^Step:[ \t]*(.*?)[ \t]*$", reply, flags=re.MULTILINE)
    if len(lines) != 1:
        raise ReplyError("no step line", f"Your reply has {len(lines)} lines that start with 'Step:', it needs one.")
    if lines[0].lower() == "no":
        return None
    if not re.fullmatch(r"[0-9]{1,4}", lines[0]):
        raise ReplyError("no step number", f"'Step: {lines[0]}' is neither 'Step: no' nor the number of a step.")
    if not 1 <= int(lines[0]) <= steps:
        raise ReplyError("step out of range", f"There is no step {lines[0]}: the steps are 1 to {steps}.")
    return int(lines[0])


def parse_revision(reply: str, trajectory: Trajectory, special_tokens: Sequence[str] = ()) -> Revision | None:
    """The step to be replaced and its replacement, None if the reply says "Step: no"."""
    head, found, text = reply.partition("\nCorrected step:")
    step = parse_location(head, len(trajectory.steps))
    if step is None:
        return None
    analysis = re.search(r"^Analysis:\s*(\S.*)", head, flags=re.MULTILINE | re.DOTALL)
    if analysis is None:
        raise ReplyError("no analysis", "Your reply has no line that starts with 'Analysis:' and says why.")
    text = text.strip()
    if not found or not text:
        raise ReplyError("no corrected step", "Your reply has no text after a line 'Corrected step:'.")
    if any(token in text for token in special_tokens):
        raise ReplyError("special token", "The corrected step holds a special token of the model: leave it out.")
    fault = _step_fault(text, trajectory.tools)
    if fault is not None:
        raise ReplyError("bad corrected step", f"The corrected step is badly formed: {fault}.")
    if step_texts(trajectory)[step - 1].startswith(text):
        raise ReplyError("nothing corrected", f"The corrected step is the same as step {step}.")
    return Revision(step, analysis.group(1).strip(), text)


def _step_fault(text: str, tools: Sequence[str]) -> str | None:
    """What keeps `text` from being a step that still waits for its result, or a last step; None if it is one."""
    if protocol.ending_call(text, tools) is None:
        return protocol.format_error((text,), tools)
    rest = f"{protocol.opening(protocol.ANSWER)}\\boxed{{0}}{protocol.closing(protocol.ANSWER)}"
    return protocol.format_error((text, rest), tools)


def parse_thinking(reply: str, blocks: int, tools: Iterable[str], special_tokens: Sequence[str] = ()) -> list[str]:
    """The new text of each of the `blocks` think blocks, in order."""
    before, *parts = re.split(r"^Think[ \t]+([0-9]+):", reply, flags=re.MULTILINE)
    if before.strip():
        raise ReplyError("text before", "Your reply must start with 'Think 1:'.")
    numbers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if numbers != [str(number) for number in range(1, blocks + 1)]:
        asked = f"'Think 1:' to 'Think {blocks}:', each once, in order" if blocks > 1 else "'Think 1:', once"
        raise ReplyError("wrong think numbers", f"Your reply must have lines that start with {asked}.")
    for number, text in zip(numbers, texts, strict=True):
        if not text:
            raise ReplyError("empty think", f"Think {number} is empty.")
        if protocol.neutralise(text, tools, special_tokens) != text:
            raise ReplyError("tag in think", f"Think {number} holds a tag or a special token: write plain text only.")
    return texts
