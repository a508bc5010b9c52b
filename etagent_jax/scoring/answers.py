"""Is an answer right? Token F1 and exact match for qa, equality of value for mathematics."""

import json
import re
import string
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from functools import lru_cache

from etagent_jax.trajectory import Question

QA_CORRECT_ABOVE = 0.8  # F1; ET-Agent's flywheel counts a qa trajectory above it as correct
LONGEST_EXPRESSION = 400  # characters; a longer mathematics answer is only compared as a string
SECONDS = 2  # bound of each of math-verify's steps: parsing the reference, parsing the answer, comparing
_CACHE = 1 << 16

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm)\{([^{}\\]*)\}")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"[+-]?(?:{_INTEGER}(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(rf"([+-]?)(?:({_INTEGER})/({_INTEGER})|\\frac\{{({_INTEGER})\}}\{{({_INTEGER})\}})")
_SPELLINGS = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", ""), ("\\right", ""), ("\\!", ""),
              ("{,}", ","), ("\\$", ""), ("−", "-"))  # fmt: skip


def correctness(question: Question, answer: str | None) -> float:
    """How right `answer` is, in [0, 1]: 0 or 1 for mathematics, the best token F1 over the references for qa.

    No answer, or a blank one, scores 0.  Pure and cached: microseconds for short answers; only
    mathematics answers that string and number comparison leave open go to math-verify (milliseconds;
    at most 3 × `SECONDS`, after which they count as wrong).
    """
    if answer is None or not answer.strip():
        return 0.0
    if question.kind == "mathematics":
        return float(any(equal_mathematics(reference, answer) for reference in question.answers))
    return max(token_f1(reference, answer) for reference in question.answers)


def is_correct(question: Question, score: float) -> bool:
    """Whether `score`, from `correctness`, counts as correct: 1 for mathematics, F1 > 0.8 for qa."""
    return score == 1.0 if question.kind == "mathematics" else score > QA_CORRECT_ABOVE


def exact_match(question: Question, answer: str | None) -> bool:
    """EM: for qa the normalised strings are equal (any reference); for mathematics the values are."""
    if question.kind == "mathematics":
        return correctness(question, answer) == 1.0
    return answer is not None and any(normalise(answer) == normalise(reference) for reference in question.answers)


@lru_cache(_CACHE)
def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, ASCII punctuation and articles removed, blanks squeezed.

    Where nothing would be left ("A", "The The", "+"), only case and blanks are normalised.
    """
    lower = text.lower()
    words = _ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split()
    return " ".join(words or lower.split())


@lru_cache(_CACHE)
def token_f1(reference: str, answer: str) -> float:
    """Harmonic mean of token precision and recall after `normalise` (SQuAD, Rajpurkar et al. 2016).

    As in HotpotQA's official metric, "yes" and "no" match only exactly, so that naming both earns nothing.
    """
    reference, answer = normalise(reference), normalise(answer)
    if reference == answer:
        return float(bool(reference))
    if reference in ("yes", "no") or answer in ("yes", "no"):
        return 0.0
    wanted, given = reference.split(), answer.split()
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


@lru_cache(_CACHE)
def equal_mathematics(reference: str, answer: str) -> bool:
    """Whether two mathematics answers, plain or LaTeX, have the same value.

    Decided by the first of: the reference is words (`\\text{east}`); same string; both are plain numbers;
    the reference is a plain number and the answer holds neither digit nor command; math-verify.
    """
    words = _WORDS.fullmatch(reference.strip())
    if words:
        given = _WORDS.fullmatch(answer.strip())
        return normalise(words.group(1)) == normalise(given.group(1) if given else answer)
    wanted, given_text = _respell(reference), _respell(answer)
    if "".join(wanted.split()) == "".join(given_text.split()):
        return True
    if len(given_text) > LONGEST_EXPRESSION or not given_text:
        return False
    # A `$` or a box inside would let one answer offer several values to math-verify, which picks one.
    if "$" in given_text or "\\boxed" in given_text:
        return False
    wanted_number, given_number = _plain_number(wanted), _plain_number(given_text)
    if wanted_number is not None and given_number is not None:
        rounded = _DECIMAL.fullmatch(wanted) is None or _DECIMAL.fullmatch(given_text) is None
        if wanted_number == given_number or not rounded:
            return wanted_number == given_number
    if wanted_number is not None and not re.search(r"[\d\\]", given_text):
        return False
    if threading.current_thread() is threading.main_thread():
        return _symbolically_equal(wanted, given_text)
    return _symbolically_equal_in_process(wanted, given_text)


def _respell(text: str) -> str:
    for old, new in _SPELLINGS:
        text = text.replace(old, new)
    return text.strip(" \t\n$").removesuffix(".")


def _plain_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or ratio (`1,000`, `-.5`, `1/2`, `\\frac{1}{2}`), else None."""
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return None
    above, below = (int(part.replace(",", "")) for part in ratio.groups()[1:] if part is not None)
    if below == 0:
        return None
    return Fraction(-above if ratio.group(1) == "-" else above, below)


def _symbolically_equal(reference: str, answer: str) -> bool:
    """math-verify's judgement; its time bounds use a signal, so this works in the main thread only."""
    from math_verify import parse, verify  # half a second to import, and seldom needed

    wanted, given = (parse(f"${text}$", parsing_timeout=SECONDS) for text in (reference, answer))
    return bool(verify(wanted, given, timeout_seconds=SECONDS))


def _symbolically_equal_in_process(reference: str, answer: str) -> bool:
    """The same from any other thread, in a fresh process (about a second)."""
    code = (
        "import json, sys; from etagent_jax.scoring.answers import _symbolically_equal as equal; "
        "print(int(equal(*json.load(sys.stdin))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([reference, answer]),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.split()[-1] == "1"
