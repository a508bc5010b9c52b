"""The python tool's results, bounds and recovery, and local search against a plain BM25."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from etagent_jax.tools.python import EMPTY_OUTPUT, PythonTool
from etagent_jax.tools.python_worker import CUT_NOTE, MAX_ERROR_CHARS
from etagent_jax.tools.search import NO_RESULTS, LocalSearch


@pytest.fixture
async def python(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tool = PythonTool(timeout_seconds=10, workers=2, max_output_chars=200)
    yield tool
    await tool.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("print(1 + 2)", "ok", "3"),
        ("x = 20\nx + 1", "ok", "21"),
        ("'a text'", "ok", "a text"),
        ("print(1)\n2", "ok", "1\n2"),
        ("x = 1", "empty", EMPTY_OUTPUT),
        ("L = []\nL.append(1)", "empty", EMPTY_OUTPUT),
        ("print(' ')", "empty", EMPTY_OUTPUT),
        ("", "empty", EMPTY_OUTPUT),
        ("print('kept')\ny", "error", "kept\nNameError: name 'y' is not defined"),
        ("def f(:", "error", "SyntaxError: invalid syntax"),
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("raise ValueError", "error", "ValueError"),
        ("raise ValueError('two\\nlines')", "error", "ValueError: two lines"),
        ("import sys; print(1); sys.exit()", "ok", "1"),
        ("import sys; sys.exit(3)", "error", "SystemExit: 3"),
        ("import os; os.abort()", "error", "the code ended without a result (SIGABRT)"),
        ("import os; os._exit(4)", "error", "the code ended without a result (exit status 4)"),
        ("input()", "error", "EOFError: EOF when reading a line"),
        ("if __name__ == '__main__': print('main')", "ok", "main"),
        ("import sys; print('lost', file=sys.stderr); print('é\\ud800')", "ok", "é\\ud800"),
        ("\x00", "error", "SyntaxError: source code string cannot contain null bytes"),
        ("'\ud800'", "error", None),
        ("x = 'a' * 10**10", "error", "MemoryError"),
        ("open('f', 'wb').write(bytes(10**8))", "error", "OSError: [Errno 27] File too large"),
    ],
)
async def test_python_results(python, code, status, output):
    result = await python.run(code)
    assert result.status == status
    if output is not None:
        assert result.output == output
    assert result.failed == (status != "ok")


async def test_python_starts_from_nothing_and_leaves_nothing(python):
    code = (
        "import builtins, os, sys\n"
        "print(hasattr(builtins, 'left'), os.listdir('.'), 'HOME' in os.environ)\n"
        "print(len(os.listdir('/proc/self/fd')) < 7)\n"
        "builtins.left = True\n"
        "open('left', 'w').write('x')\n"
        "sys.modules['json'] = None\n"
    )
    outputs = [(await python.run(code)).output for _ in range(4)]
    assert outputs == ["False [] False\nTrue"] * 4


async def test_python_output_is_repeatable_across_workers():
    outputs = set()
    for _ in range(2):
        tool = PythonTool()
        outputs.add((await tool.run("print({'one', 'two', 'three', 'four'})")).output)
        await tool.close()
    assert len(outputs) == 1


async def test_python_cuts_long_output_and_still_shows_the_error(python):
    result = await python.run("print('é' * 10**7)\n1 / 0")
    printed, error = result.output.rsplit("\n", 1)
    assert len(printed) == 200
    assert printed.endswith(CUT_NOTE)
    assert printed.startswith("é" * 100)
    assert error == "ZeroDivisionError: division by zero"
    assert (await python.run("print('é' * 200)")).output == "é" * 200
    assert len((await python.run("raise ValueError('x' * 10**6)")).output) == MAX_ERROR_CHARS


async def test_python_timeout_keeps_what_was_printed():
    tool = PythonTool(timeout_seconds=0.3)
    result = await tool.run("print('first')\nwhile True: pass")
    assert (result.status, result.output) == ("timeout", "first\nTimeoutError: not done after 0.3 s")
    assert (await tool.run("1")).output == "1"
    await tool.close()


DAEMON = (
    "import os, time\npid = os.fork()\nif pid == 0:\n    os.setsid()\n    time.sleep(1000)\nprint(pid, flush=True)\n"
)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may start processes inside the tool")
@pytest.mark.parametrize(("ending", "status"), [("", "ok"), ("time.sleep(1000)", "timeout")])
async def test_python_leaves_no_descendant(ending, status):
    tool = PythonTool(timeout_seconds=0.5)
    result = await tool.run(DAEMON + ending)
    assert result.status == status
    assert not is_alive(int(result.output.split()[0]))
    await tool.close()


@pytest.mark.skipif(os.getuid() == 0, reason="root is not bound by the number of processes")
async def test_python_cannot_start_processes(python):
    assert (await python.run("import os; os.fork()")).output.startswith("BlockingIOError")


async def test_python_replaces_a_worker_that_died(python):
    await python.run("1")
    for worker in python._idle:
        os.kill(worker.pid, signal.SIGKILL)
        await worker.wait()
    assert (await python.run("2")).output == "2"


async def test_python_is_unavailable_when_the_code_kills_every_worker(python):
    result = await python.run("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    assert result.status == "unavailable"
    assert (await python.run("3")).output == "3"


async def test_python_runs_calls_side_by_side(python, tmp_path):
    wait_for_the_other = (
        "import os, time\n"
        "open({mine!r}, 'w').close()\n"
        "while not os.path.exists({other!r}): time.sleep(0.001)\n"
        "print('met')"
    )
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    results = await asyncio.gather(
        python.run(wait_for_the_other.format(mine=one, other=two)),
        python.run(wait_for_the_other.format(mine=two, other=one)),
    )
    assert [result.output for result in results] == ["met", "met"]


async def test_python_cancelled_call_leaves_no_reply_process_or_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    tool = PythonTool(workers=1)
    started = tmp_path / "started"
    os.mkfifo(started)
    code = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\nprint('stale')\ntime.sleep(1000)"
    running = asyncio.create_task(tool.run(code))
    pid = int(await asyncio.to_thread(started.read_text))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await tool.run("print('fresh')")).output == "fresh"
    workers = [*tool._idle, *tool._leaving]
    assert len(workers) == 2
    assert os.listdir(folder)
    await tool.close()
    assert not is_alive(pid)
    assert not any(is_alive(worker.pid) for worker in workers)
    assert not os.listdir(folder)
    assert (await tool.run("'again'")).output == "again"
    await tool.close()


@pytest.mark.parametrize("field", ["timeout_seconds", "memory_mib", "workers", "max_output_chars"])
def test_python_refuses_bounds_that_are_not_positive(field):
    with pytest.raises(ValueError, match=field):
        PythonTool(**{field: 0})


def test_tools_and_rollouts_import_no_jax():
    modules = "etagent_jax.tools.python, etagent_jax.tools.search, etagent_jax.rollout.collector"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DOCUMENTS = [
    "The capital of Zantor is Mira.",
    "The mayor of Zantor is Bo. Bo, the mayor!",
    "Mira is a city.",
    "of of of",
    "A capital letter stands at the start of a sentence, and a sentence is what the capital of a name is in.",
]


def plain_bm25(documents: list[list[str]], query: list[str]) -> list[float]:
    """Robertson's formula with Lucene's idf, k1 = 1.5 and b = 0.75, one document and word at a time."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df = sum(word in other for other in documents)
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(document) / mean_length))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["capital of Zantor", "MAYOR, mayor", "is a", "the nothing of", "unseen words"])
def test_search_scores_are_bm25(query):
    split = [document.lower().replace(".", "").replace(",", "").replace("!", "").split() for document in DOCUMENTS]
    expected = plain_bm25(split, query.lower().replace(",", "").split())
    np.testing.assert_allclose(LocalSearch(DOCUMENTS).scores(query), expected, rtol=1e-12, atol=0)


async def test_search_results():
    search = LocalSearch(DOCUMENTS, top_n=2)
    result = await search.run("capital of zantor?")
    assert (result.status, result.output.split("\n")) == ("ok", [DOCUMENTS[0], DOCUMENTS[1]])
    assert (await LocalSearch(DOCUMENTS, max_chars=7).run("city")).output == "Mira is"
    only_one_matches = await LocalSearch(DOCUMENTS, top_n=5).run("city")
    assert only_one_matches.output == "Mira is a city."
    more_asked_than_there_are = await LocalSearch(["a b", "b", "a b"], top_n=9).run("a")
    assert more_asked_than_there_are.output == "a b\na b"
    assert (await LocalSearch(["x one", "x two", "x six"]).run("x")).output == "x one"


async def test_search_without_results():
    search = LocalSearch(DOCUMENTS)
    for query in ("unseen", "?!"):
        result = await search.run(query)
        assert (result.status, result.output) == ("empty", NO_RESULTS)
    assert (await search.run(" \n")).status == "error"


async def test_search_reads_a_corpus_file(tmp_path):
    text, lines = tmp_path / "c.txt", tmp_path / "c.jsonl"
    text.write_text("first fact\n\nsecond\u2028 fact\n", encoding="utf-8")
    lines.write_text('{"text": "first fact"}\n{"text": "second fact", "id": 2}\n')
    assert (await LocalSearch.from_file(text).run("second")).output == "second\u2028 fact"
    assert (await LocalSearch.from_file(lines).run("second")).output == "second fact"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", None, "c.txt: there is no such file"),
        ("c.txt", "\n \n", "c.txt: the file holds no documents"),
        ("c.txt", "...\n", "holds no documents with words"),
        ("c.csv", "a,b", "must end in .txt or .jsonl"),
        ("c.jsonl", '{"text": "a"}\n{"text"', "c.jsonl, line 2: is not JSON"),
        ("c.jsonl", '{"text": "a"}\n\n{"txt": "b"}', "c.jsonl, line 3: needs an object with a string `text`"),
    ],
)
def test_search_refuses_a_bad_corpus(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LocalSearch.from_file(path)


def test_search_refuses_an_empty_corpus():
    with pytest.raises(ValueError, match="no documents"):
        LocalSearch([])
