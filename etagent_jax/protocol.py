"""The tag language an agent speaks: what it may write, what is read from it, what is wrong with it.

An assistant's turn is one continued text of blocks::

    <think>…</think><search>query</search><result>…</result><think>…</think><answer>\\boxed{…}</answer>

The program writes the `<result>` blocks, everything else is the model's.  So that nothing a tool
returns can be mistaken for the model's words, the functions here never see tool output: they take
`turns`, the texts the model wrote, split where a tool result was inserted.  `turns[i]` for
`i < len(turns) - 1` was followed by a result; the last one (which may be empty) was not.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

THINK, ANSWER, RESULT = "think", "answer", "result"
RESERVED = (THINK, ANSWER, RESULT)


def opening(tag: str) -> str:
    return f"<{tag}>"


def closing(tag: str) -> str:
    return f"</{tag}>"


def stop_strings(tools: Iterable[str]) -> tuple[str, ...]:
    """Strings at which generation must stop: the end of a tool call, and of the answer."""
    return (*(closing(tool) for tool in tools), closing(ANSWER))


def tags(tools: Iterable[str]) -> tuple[str, ...]:
    """Every tag of the language with these tools."""
    return tuple(tag for name in (*RESERVED, *tools) for tag in (opening(name), closing(name)))


def render_result(text: str) -> str:
    """The block appended after a call; `text` must have been through `neutralise`."""
    return f"{opening(RESULT)}{text}{closing(RESULT)}"


def system_prompt(descriptions: Mapping[str, str]) -> str:
    """The system message that explains the language; `descriptions` holds one line for each tool."""
    tools = "\n".join(f"- {opening(tool)}…{closing(tool)}: {text}" for tool, text in descriptions.items())
    return (
        "Solve the question step by step. Think inside <think>…</think>. When it helps, call a tool:\n"
        f"{tools}\n"
        "The result follows inside <result>…</result>; then think again. Call a tool only where it is needed, "
        "and do not repeat a call. Finish with <answer>…</answer>, which holds the final answer once, in \\boxed{}."
    )


@functools.lru_cache
def _untrusted(tools: tuple[str, ...], special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches what `neutralise` breaks, up to where the blank goes."""
    names = "|".join(map(re.escape, (*RESERVED, *tools)))
    # A `<` followed by a blank no longer opens a tag.
    patterns = [rf"(?i:<(?=(?:/\s*)?(?:{names})\s*>))"]
    for token in special_tokens:
        head = len(token) - len(token.lstrip()) + 1
        if token[head:].strip():
            patterns.append(f"{re.escape(token[:head])}(?={re.escape(token[head:])})")
    return re.compile("|".join(patterns))


def neutralise(text: str, tools: Iterable[str], special_tokens: Iterable[str] = ()) -> str:
    """`text` with every protocol tag and special token broken by a space: `<think>` → `< think>`.

    Tags are matched loosely (any case, stray blanks) because readers, models included, are lenient.
    Afterwards no string of `special_tokens` with more than one visible character occurs in the
    text, so that encoding it yields ordinary tokens only.
    """
    pattern = _untrusted(tuple(tools), tuple(special_tokens))
    while (broken := pattern.sub(r"\g<0> ", text)) != text:
        text = broken
    return broken


def ending_call(text: str, tools: Iterable[str]) -> tuple[str, str] | None:
    """`(tool, input)` if the turn `text` ends in a closed call, else None.

    A closing tag without its opening tag is not a call.
    """
    text = text.rstrip()
    for tool in tools:
        if text.endswith(closing(tool)):
            start = text.rfind(opening(tool))
            if start < 0:
                return None
            inside = text[start + len(opening(tool)) : -len(closing(tool))]
            return None if closing(tool) in inside else (tool, inside.strip())
    return None


def _closing_brace(text: str, start: int) -> int:
    """Index of the `}` that closes a `{` standing just before `start`, or -1."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return -1


def boxed(text: str) -> list[str]:
    """Contents of every `\\boxed{…}` in `text`, in order, braces balanced; an unclosed one is left out."""
    starts = (match.end() for match in re.finditer(r"\\boxed\s*\{", text))
    spans = ((start, _closing_brace(text, start)) for start in starts)
    return [text[start:end] for start, end in spans if end >= 0]


def unwrap_text(answer: str) -> str:
    """`answer` without a `\\text{…}` around the whole of it."""
    answer = answer.strip()
    prefix = "\\text{"
    if answer.startswith(prefix) and _closing_brace(answer, len(prefix)) == len(answer) - 1:
        return answer[len(prefix) : -1].strip()
    return answer


def extract_answer(turns: Sequence[str]) -> str | None:
    """The last `\\boxed{}` of the last closed `<answer>` block of the final turn; None without one."""
    end = turns[-1].rfind(closing(ANSWER))
    start = turns[-1].rfind(opening(ANSWER), 0, max(end, 0))
    if start < 0:
        return None
    boxes = boxed(turns[-1][start:end])
    return unwrap_text(boxes[-1]) if boxes else None


def displayed_answer(turns: Sequence[str]) -> str | None:
    """The answer for people to look at: as `extract_answer`, else the last `\\boxed{}` of any turn."""
    answer = extract_answer(turns)
    if answer is not None:
        return answer
    boxes = [box for turn in turns for box in boxed(turn)]
    return unwrap_text(boxes[-1]) if boxes else None


def format_error(turns: Sequence[str], tools: Iterable[str]) -> str | None:
    """What is wrong with the format, in one sentence, or None if it is valid.

    Valid: starts with `<think>`; tags pair up and none is inside another; the model writes no
    `<result>`; every tool block ends its turn and has its result; exactly one `<answer>`, last,
    with exactly one `\\boxed{}` (ET-Agent's rules, read from segments instead of flat text).
    """
    tools = tuple(tools)
    tag_pattern = re.compile(rf"<(/?)({'|'.join(map(re.escape, (*RESERVED, *tools)))})>")
    if not turns[0].lstrip().startswith(opening(THINK)):
        return "does not start with <think>"
    answers = 0
    for number, turn in enumerate(turns):
        inside, body = None, 0
        last_block, last_end = None, 0
        for match in tag_pattern.finditer(turn):
            is_closing, tag = match.group(1) == "/", match.group(2)
            if tag == RESULT:
                return "the model wrote a <result> tag"
            if not is_closing:
                if inside is not None:
                    return f"<{tag}> inside <{inside}>"
                if answers:
                    return f"<{tag}> after the answer"
                if last_block in tools:
                    return f"<{tag}> after a call without its result"
                inside, body = tag, match.end()
                continue
            if inside != tag:
                return f"</{tag}> without <{tag}>"
            if tag == ANSWER:
                answers += 1
                if len(boxed(turn[body : match.start()])) != 1:
                    return "the answer does not hold exactly one \\boxed{}"
            inside, last_block, last_end = None, tag, match.end()
        if inside is not None:
            return f"<{inside}> is not closed"
        followed_by_result = number < len(turns) - 1
        if followed_by_result and (last_block not in tools or turn[last_end:].strip()):
            return "a result does not follow a call"
        if not followed_by_result and last_block in tools:
            return "the last call has no result"
        if not followed_by_result and answers and turn[last_end:].strip():
            return "text after the answer"
    return None if answers else "no <answer> block"
