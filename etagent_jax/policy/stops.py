"""Stop strings as one automaton over tokens, so that a compiled loop finds the token that completes one.

A stop string may begin in the middle of one token and end in the middle of another.  The automaton
of Aho and Corasick (1975) reads the characters of a token at once: `table[state, token]` is the
state after it, and one absorbing state per set of strings means that one of them has occurred.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np


def build_automaton(stops: Sequence[str]) -> tuple[list[dict[str, int]], int]:
    """Character transitions of the states (state 0 is the start) and the accepting state.

    A missing character leads back to state 0.
    """
    goto: list[dict[str, int]] = [{}]
    ends: set[int] = set()
    for stop in stops:
        state = 0
        for character in stop:
            if character not in goto[state]:
                goto.append({})
                goto[state][character] = len(goto) - 1
            state = goto[state][character]
        ends.add(state)
    fail = [0] * len(goto)
    queue = deque(goto[0].values())
    while queue:
        state = queue.popleft()
        if fail[state] in ends:
            ends.add(state)
        for character, child in list(goto[state].items()):
            fail[child] = goto[fail[state]].get(character, 0)
            queue.append(child)
        goto[state] = {**goto[fail[state]], **goto[state]}
    accept = len(goto)
    moves = [{c: accept if s in ends else s for c, s in state.items()} for state in goto]
    return [*moves, {}], accept


def check_stops(stops: Sequence[str]) -> None:
    """ValueError for a stop string that a StopTable cannot hold."""
    for stop in stops:
        if not stop or not stop.isascii():
            raise ValueError(f"stop string {stop!r}: must be ASCII and not empty")


class StopTable:
    """Automata of the sets of stop strings asked for so far, in one table [capacity, vocabulary].

    token_texts: each token's own text.  Stop strings are ASCII, so that a token which holds only
    part of a character cannot hold part of a stop string.
    """

    def __init__(self, token_texts: Sequence[str], capacity: int = 64):
        self._texts = token_texts
        self._by_first: dict[str, list[int]] = defaultdict(list)
        for token, text in enumerate(token_texts):
            self._by_first[text[:1]].append(token)
        self._starts: dict[tuple[str, ...], int] = {}
        self.used = 0
        self.table = np.zeros((capacity, len(token_texts)), np.int32)
        self.accepts = np.zeros(capacity, bool)

    def __contains__(self, stops: tuple[str, ...]) -> bool:
        return stops in self._starts

    def fits(self, stops: tuple[str, ...]) -> bool:
        """Whether the table holds `stops` without growing."""
        return stops in self or self.used + len(build_automaton(stops)[0]) <= len(self.accepts)

    def clear(self) -> None:
        """Forget all sets; the table keeps its size."""
        self._starts.clear()
        self.accepts[:] = False
        self.used = 0

    def start(self, stops: tuple[str, ...]) -> int:
        """The state in which to begin a generation that must stop at one of `stops`."""
        if stops not in self._starts:
            self._add(stops)
        return self._starts[stops]

    def _add(self, stops: tuple[str, ...]) -> None:
        check_stops(stops)
        moves, accept = build_automaton(stops)
        offset = self.used
        while offset + len(moves) > len(self.accepts):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self.accepts = np.concatenate([self.accepts, np.zeros_like(self.accepts)])
        self.table[offset] = [offset + _run(moves, accept, 0, text) for text in self._texts]
        for state, characters in enumerate(moves[:accept]):
            # A character that leads nowhere from `state` leads nowhere from the start either.
            self.table[offset + state] = self.table[offset]
            self.table[offset + state, self._by_first[""]] = offset + state
            for token in (token for c in characters for token in self._by_first[c]):
                self.table[offset + state, token] = offset + _run(moves, accept, state, self._texts[token])
        self.table[offset + accept] = offset + accept
        self.accepts[offset + accept] = True
        self.used += len(moves)
        self._starts[stops] = offset


def _run(moves: list[dict[str, int]], accept: int, state: int, text: str) -> int:
    for character in text:
        if state == accept:
            return accept
        state = moves[state].get(character, 0)
    return state
