"""Questions from a JSON or JSONL file, checked row by row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etagent_jax.trajectory import Question, QuestionKind


def load_questions(
    path: str | Path, *, kind: QuestionKind | None = None, category: str | None = None
) -> list[Question]:
    """Read a `.jsonl` file (an object a line; blank lines are skipped) or a `.json` file (a list of objects).

    Fields: `question` or `text`; `answer` or `answers` (a string, a number, or a list of them: any is
    right); optional `id` (else the file's stem and the row number), `kind` (else the argument), and
    `category` or `source` (else the argument, else the file's stem).  Other fields are ignored.
    Raises FileNotFoundError, or ValueError with one sentence that names file, row and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such question file")
    questions: list[Question] = []
    rows: dict[str, str] = {}
    for number, where, row in _rows(path):
        question = _question(row, where, f"{path.stem}-{number}", kind, category or path.stem)
        if question.id in rows:
            raise ValueError(
                f"{where}: the id {question.id!r} was already used at {rows[question.id]}; ids must differ"
            )
        rows[question.id] = where
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: the file holds no questions")
    return questions


def _rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, where it stands, value) of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, f"{path}, line {number}", _parse(line, f"{path}, line {number}")
    elif path.suffix == ".json":
        values = _parse(text, str(path)) if text.strip() else []
        if not isinstance(values, list):
            raise ValueError(f"{path}: a .json question file must be a list of objects; use .jsonl for one a line")
        yield from ((number, f"{path}, item {number}", value) for number, value in enumerate(values, 1))
    else:
        raise ValueError(f"{path}: a question file must end in .jsonl or .json")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: broken JSON, {error.msg} (line {error.lineno}, column {error.colno} of it)"
        ) from error


def _question(row: Any, where: str, default_id: str, kind: QuestionKind | None, category: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with `question` and `answer`, found {type(row).__name__}")
    text = _field(row, ("question", "text"), where)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: field `question` must be a string that is not empty")
    kind = row.get("kind") or kind
    if kind is None:
        raise ValueError(f"{where}: no field `kind`; add it (mathematics or qa), or say which kind the whole file is")
    if kind not in ("mathematics", "qa"):
        raise ValueError(f"{where}: field `kind` is {kind!r}, must be mathematics or qa")
    identifier = row.get("id")
    return Question(
        id=default_id if identifier in (None, "") else str(identifier),
        text=text,
        answers=_answers(_field(row, ("answer", "answers"), where), where),
        kind=kind,
        category=str(row.get("category") or row.get("source") or category),
    )


def _field(row: dict[str, Any], names: tuple[str, str], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{where}: no field `{names[0]}` (or `{names[1]}`); it is required")


def _answers(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where}: field `answer` is an empty list; give at least one answer")
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"{where}: field `answer` must be a string or a list of strings, found {one!r}")
        if not str(one).strip():
            raise ValueError(f"{where}: field `answer` is empty")
    return tuple(str(one) for one in values)
