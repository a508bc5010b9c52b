"""Local search: BM25 over documents held in memory."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from etagent_jax.trajectory import ToolResult

NO_RESULTS = "no results"
EMPTY_QUERY = "empty query"
K1, B = 1.5, 0.75


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class LocalSearch:
    """Finds the documents that answer a query best, by BM25, words lower-cased and otherwise as they are.

    top_n: documents in a result, best first, one a line, those that share no word with the query
    left out; ties go to the earlier document.  max_chars: of each document.

    Score of a document for a word that `df` of the `N` documents hold, `tf` times in this one of
    `length` words: ln(1 + (N − df + ½) / (df + ½)) · tf / (tf + K1 (1 − B + B · length / mean length)),
    as in Lucene; a query's is the sum over its words.  It is computed here, once for each word and
    document, because the bm25s package starts JAX when it is imported and tools must not.
    """

    name = "search"
    description = "searches a collection of documents and returns those that fit the query best"

    def __init__(self, documents: Sequence[str], top_n: int = 1, max_chars: int = 1000):
        if top_n < 1 or max_chars < 1:
            raise ValueError(f"search: top_n and max_chars must be positive, got {top_n} and {max_chars}")
        counts = [Counter(_words(document)) for document in documents]
        lengths = np.array([count.total() for count in counts])
        if not lengths.any():
            raise ValueError("search: the corpus holds no documents with words in them")
        self._documents = [document[:max_chars] for document in documents]
        self._top_n = top_n
        saturation = K1 * (1 - B + B * lengths / lengths.mean())

        occurrences: dict[str, tuple[list[int], list[int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                numbers, frequencies = occurrences.setdefault(word, ([], []))
                numbers.append(number)
                frequencies.append(times)
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (numbers, frequencies) in occurrences.items():
            df, tf = len(numbers), np.array(frequencies)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            self._postings[word] = np.array(numbers), idf * tf / (tf + saturation[numbers])

    @classmethod
    def from_file(cls, path: str | Path, top_n: int = 1, max_chars: int = 1000) -> Self:
        """Read a corpus: one document a line (.txt), or one JSON object a line with its `text` (.jsonl)."""
        path = Path(path)
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"corpus {path}: the name must end in .txt or .jsonl")
        if not path.is_file():
            raise FileNotFoundError(f"corpus {path}: there is no such file")
        lines = path.read_text(encoding="utf-8").split("\n")
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            raise ValueError(f"corpus {path}: the file holds no documents")
        if path.suffix == ".txt":
            return cls([line for _, line in numbered], top_n, max_chars)
        return cls([_text_of(line, f"corpus {path}, line {number}") for number, line in numbered], top_n, max_chars)

    def scores(self, query: str) -> np.ndarray:
        """Float64 BM25 score of every document."""
        scores = np.zeros(len(self._documents))
        for word in _words(query):
            if word in self._postings:
                numbers, values = self._postings[word]
                scores[numbers] += values
        return scores

    async def run(self, text: str) -> ToolResult:
        """The best documents for the query `text`; status `empty` if none shares a word with it."""
        start = time.perf_counter()
        if not text.strip():
            return ToolResult(EMPTY_QUERY, "error")
        scores = self.scores(text)
        best = [int(scores.argmax())] if self._top_n == 1 else np.argsort(-scores, kind="stable")[: self._top_n]
        found = [self._documents[number] for number in best if scores[number] > 0]
        seconds = time.perf_counter() - start
        return ToolResult("\n".join(found), "ok", seconds) if found else ToolResult(NO_RESULTS, "empty", seconds)

    async def close(self) -> None:
        """Nothing to let go of."""


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: needs an object with a string `text`")
    return str(row["text"])
