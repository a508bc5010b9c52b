"""Which slot of the embedded engine holds the longest cached prefix of a sequence."""

import numpy as np


class Prefixes:
    """What each slot has cached: its first tokens in whole chunks, as prefill computed them.

    Only those are ever taken over, so that a sequence's keys are the same bits whatever ran earlier.
    """

    def __init__(self, slots: int, chunk: int):
        self._chunk = chunk
        self._cached = np.zeros(slots, np.int32)  # tokens
        self._sessions = [""] * slots
        self._last_used = np.zeros(slots, np.int64)
        self._clock = 0

    def find(self, ids: np.ndarray, tokens: np.ndarray, active: np.ndarray, session: str) -> tuple[int, int, int]:
        """The slot that holds most of ids [n], the free slot to use, and the number of tokens held.

        tokens [slots, size]: of each slot.  active [slots] bool: not free; one is.  The free slot is that of the
        session if it holds as much as any, else the one unused for longest.
        """
        self._clock += 1
        shared = np.cumprod(tokens[:, : len(ids)] == ids, axis=1).sum(axis=1)
        held = np.minimum(np.minimum(shared, len(ids) - 1) // self._chunk * self._chunk, self._cached)
        free = np.flatnonzero(~active)
        source = int(np.argmax(held))
        start = int(held[source])
        own = [int(slot) for slot in free if self._sessions[slot] == session and session]
        if own and held[own[0]] == start:
            source = slot = own[0]
        else:
            slot = int(free[np.argmin(self._last_used[free])])
        self._last_used[slot] = self._clock
        return source, slot, start

    def hold(self, slot: int, cached: int, session: str) -> None:
        """The slot now has the first `cached` tokens of its sequence, of that session."""
        self._cached[slot], self._sessions[slot] = cached, session

    def forget(self) -> None:
        """Nothing that is cached is found again."""
        self._cached[:] = 0
