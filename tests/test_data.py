"""Pareto selection against its definition, question files with every fault, and files cut short."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etagent_jax.data import pareto
from etagent_jax.data.questions import load_questions
from etagent_jax.data.store import TrajectoryLog, write_json_atomic
from etagent_jax.trajectory import Group, Question
from tests.test_scoring import attempt

SHARED = Path(__file__).parents[2] / "shared" / "data"

# ---------------------------------------------------------------- Pareto selection


def dominates(a, b) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def plain_fronts(points) -> list[list[int]]:
    """O(N²) or worse, from the definition."""
    left, result = set(range(len(points))), []
    while left:
        best = sorted(i for i in left if not any(dominates(points[j], points[i]) for j in left))
        result.append(best)
        left -= set(best)
    return result


def plain_crowding(points) -> list[float]:
    distance = [0.0] * len(points)
    for axis in (0, 1):
        order = sorted(range(len(points)), key=lambda i: (points[i][axis], i))
        extent = points[order[-1]][axis] - points[order[0]][axis]
        if extent == 0:
            continue
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            distance[i] += (points[after][axis] - points[before][axis]) / extent
    return distance


def plain_select(points, eligible, count) -> list[int]:
    kept = [i for i in range(len(points)) if eligible[i]]
    chosen: list[int] = []
    for front in plain_fronts([points[i] for i in kept]):
        if len(chosen) + len(front) > count:
            crowding = plain_crowding([points[kept[i]] for i in front])
            front = [front[k] for k in sorted(range(len(front)), key=lambda k: (-crowding[k], k))]
        chosen += [kept[i] for i in front[: count - len(chosen)]]
    return chosen


values = st.integers(0, 5).map(lambda v: v / 4)  # few values: many ties and duplicates
points = st.lists(st.tuples(values, values, st.booleans()), min_size=1, max_size=40)


@given(points, st.integers(1, 45))
@settings(deadline=None, max_examples=300)
def test_selection_is_the_definition(rows, count):
    tool, correctness, eligible = (np.array(column) for column in zip(*rows, strict=True))
    chosen = pareto.select(tool, correctness, eligible, count)
    assert chosen.tolist() == plain_select([row[:2] for row in rows], eligible, count)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=30))
@settings(deadline=None)
def test_fronts_are_the_definition(rows):
    found = pareto.fronts(np.array(rows))
    assert [np.flatnonzero(found == k).tolist() for k in range(found.max() + 1)] == plain_fronts(rows)


def mixed_group(kind, calls, scores) -> tuple[Group, np.ndarray]:
    question = Question(f"{kind}{len(calls)}", "?", ("4",), kind, "test")
    rollouts = [attempt(f"t{i}", question, [("search", f"{j}") for j in range(n)]) for i, n in enumerate(calls)]
    return Group(question, tuple(rollouts)), np.array(scores)


def test_question_statistics():
    rows = [
        mixed_group("mathematics", [0, 2, 4], [0.0, 1.0, 1.0]),
        mixed_group("mathematics", [1, 1], [1.0, 1.0]),
        mixed_group("qa", [0, 1], [0.75, 0.7]),
        mixed_group("qa", [0, 1], [0.75, 0.8]),
        mixed_group("qa", [0, 1], [0.2, 0.7]),
    ]
    found = pareto.question_statistics(*zip(*rows, strict=True))
    np.testing.assert_allclose(found.tool_variance, [8 / 3, 0, 0.25, 0.25, 0.25])
    np.testing.assert_allclose(found.correctness_variance, [2 / 9, 0, 0.025**2, 0.025**2, 0.0625])
    assert found.eligible.tolist() == [True, False, True, False, False]


def test_the_order_of_rollouts_does_not_break_ties():
    scores = [0.1, 0.7, 0.3, 0.9, 0.2, 1.0, 0.6]
    rows = [mixed_group("qa", [0] * 7, list(np.roll(scores, k))) for k in range(7)]
    assert len(set(pareto.question_statistics(*zip(*rows, strict=True)).correctness_variance)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [0.0, 1.0], [True], 1), "one of each"),
        (([math.nan], [0.0], [True], 1), "finite"),
        (([0.0], [0.0], [True], 0), "at least 1"),
    ],
)
def test_wrong_input_to_the_selection(arguments, message):
    tool, correctness, eligible, count = arguments
    with pytest.raises(ValueError, match=message):
        pareto.select(np.array(tool), np.array(correctness), np.array(eligible), count)


# ---------------------------------------------------------------- question files


def test_questions_from_jsonl(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [
        {"question": "1+1?", "answer": 2, "kind": "mathematics", "id": 7, "source": "sums", "extra": None},
        {"text": "Who\u2028?", "answers": ["Ann", "Bob"]},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert load_questions(path, kind="qa") == [
        Question("7", "1+1?", ("2",), "mathematics", "sums"),
        Question("set-3", "Who\u2028?", ("Ann", "Bob"), "qa", "set"),
    ]


def test_questions_from_json(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"question": "Who?", "answer": ["Ann"], "kind": "qa"}]))
    assert load_questions(path, category="people") == [Question("set-1", "Who?", ("Ann",), "qa", "people")]


GOOD_LINE = '{"question": "Who?", "answer": "Ann", "kind": "qa", "id": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "set.jsonl: the file holds no questions"),
        (GOOD_LINE + '{"question": "Who', "set.jsonl, line 2: broken JSON"),
        ('{"answer": "Ann", "kind": "qa"}', "line 1: no field `question`"),
        ('{"question": "Who?", "kind": "qa"}', "line 1: no field `answer`"),
        ('{"question": " ", "answer": "Ann", "kind": "qa"}', "line 1: field `question`"),
        ('{"question": "Who?", "answer": " ", "kind": "qa"}', "line 1: field `answer` is empty"),
        ('{"question": "Who?", "answer": ["Ann", ""], "kind": "qa"}', "line 1: field `answer` is empty"),
        ('{"question": "Who?", "answer": [], "kind": "qa"}', "line 1: field `answer` is an empty list"),
        ('{"question": "Who?", "answer": null, "kind": "qa"}', "line 1: field `answer` must be"),
        ('{"question": "Who?", "answer": "Ann"}', "line 1: no field `kind`"),
        ('{"question": "Who?", "answer": "Ann", "kind": "maths"}', "line 1: field `kind` is 'maths'"),
        ("[1]", "line 1: expected an object"),
        (GOOD_LINE + "\n" + GOOD_LINE, r"line 3: the id 'a' was already used at .*line 1"),
    ],
)
def test_faulty_question_files_are_named(tmp_path, content, message):
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_questions(path)


def test_question_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such question file"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "set.csv").write_text("question,answer")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.json"):
        load_questions(tmp_path / "set.csv")
    (tmp_path / "set.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list"):
        load_questions(tmp_path / "set.json")
    (tmp_path / "set.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_questions(tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("gsm8k", "mathematics", 300), ("math500", "mathematics", 200), ("bamboogle", "qa", 125), ("hotpotqa", "qa", 120)],
)
def test_public_question_sets(name, kind, count):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the public sets are not here")
    questions = load_questions(path, kind=kind)
    assert (len(questions), {q.category for q in questions}) == (count, {name})


# ---------------------------------------------------------------- trajectory log

ODD = attempt("odd", calls=[("python", "print('\u2028\\n\\ud800')\n\ud800 日本")])


def test_log_round_trip_and_going_on(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert list(TrajectoryLog(path).read()) == []
    with TrajectoryLog(path) as log:
        log.append(attempt("a"))
        assert [t.id for t in log.read()] == ["a"]
        log.append(ODD)
    with TrajectoryLog(path) as log:
        with pytest.raises(ValueError, match="'a' is in it already"):
            log.append(attempt("a"))
        log.append(attempt("b"))
    assert list(TrajectoryLog(path).read()) == [attempt("a"), ODD, attempt("b")]


@pytest.mark.parametrize("whole_lines", [0, 1, 2])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path, whole_lines):
    path = tmp_path / "log.jsonl"
    with TrajectoryLog(path) as log:
        for i in range(3):
            log.append(attempt(f"t{i}"))
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[whole_lines]
    for cut in (1, len(torn) // 2, len(torn) - 1):
        path.write_bytes(b"".join(lines[:whole_lines]) + torn[:cut])
        whole = [f"t{i}" for i in range(whole_lines)]
        assert [t.id for t in TrajectoryLog(path).read()] == whole
        with TrajectoryLog(path) as log:
            log.append(attempt("new"))
        assert [t.id for t in TrajectoryLog(path).read()] == [*whole, "new"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a"', "{}"], "line 1: broken"),
        (["[]"], "line 1: broken"),
        (['{"id": "a"}'], "line 1: not a trajectory"),
        ([json.dumps(attempt("a").to_json())] * 2, "line 2: trajectory 'a' stands at line 1"),
    ],
)
def test_a_broken_line_elsewhere_is_an_error(tmp_path, lines, message):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        list(TrajectoryLog(path).read())


WRITER = """
import itertools, sys
from etagent_jax.data.store import TrajectoryLog
from tests.test_scoring import attempt
log = TrajectoryLog(sys.argv[1])
for i in itertools.count():
    log.append(attempt(f"t{i}", tokens=2000))
    print(i, flush=True)
"""


def test_a_killed_writer_loses_at_most_the_line_in_flight(tmp_path):
    path = tmp_path / "log.jsonl"
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=root) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        reported = 20 + len(writer.stdout.read().splitlines())
    kept = [t.id for t in TrajectoryLog(path).read()]
    assert kept == [f"t{i}" for i in range(len(kept))]
    assert reported <= len(kept) <= reported + 1


def test_a_full_disk_leaves_whole_lines_only(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrajectoryLog(path)
    log.append(attempt("a"))
    room = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            log.append(attempt("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == room
    log.append(attempt("b"))
    log.close()
    assert [t.id for t in TrajectoryLog(path).read()] == ["a", "b"]


def test_write_json_atomic_keeps_the_old_content_when_it_fails(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_json_atomic(path, {"a": (0.1, 2)})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [0.1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
