"""Training sequences packed into rows of one length: the only thing that crosses from rollouts to the loss.

Shapes: n tokens of a sequence, R rows, T tokens of a row.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from etagent_jax.trajectory import Source, Trajectory

DTYPES = {
    "tokens": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "loss_mask": np.bool_,
    "advantages": np.float32,
    "sampler_logprobs": np.float32,
}


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSequence:
    """One sequence as it was served, and which of its tokens are learned.

    name: of the trajectory it was made from, for messages.
    token_ids: int32 [n].
    loss_mask: bool [n], True where this token is predicted with loss; never the first.
    logprobs: float32 [n], the sampler's log-probabilities, 0 where the sampler gave none.
    advantage: of the whole sequence; only a policy loss reads it.
    """

    name: str
    token_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    advantage: float = 0.0

    def __post_init__(self) -> None:
        for field, dtype in {"token_ids": np.int32, "loss_mask": np.bool_, "logprobs": np.float32}.items():
            array = getattr(self, field)
            if array.dtype != dtype or array.shape != (self.token_ids.size,):
                raise ValueError(f"sequence {self.name}: {field} is {array.dtype} {array.shape}, "
                                 f"needs {np.dtype(dtype)} ({self.token_ids.size},)")  # fmt: skip
        if self.token_ids.size == 0:
            raise ValueError(f"sequence {self.name}: it has no tokens")
        if self.loss_mask[0]:
            raise ValueError(f"sequence {self.name}: its first token bears loss, but nothing predicts it")
        if not (np.isfinite(self.logprobs).all() and np.isfinite(self.advantage)):
            raise ValueError(f"sequence {self.name}: a log-probability or the advantage is not finite")

    def __len__(self) -> int:
        return self.token_ids.size


def sequence_from_trajectory(
    trajectory: Trajectory, *, sources: tuple[Source, ...], advantage: float = 0.0
) -> TrainingSequence:
    """The trajectory as a training sequence in which the segments of `sources` bear loss.

    Supervised fine-tuning learns from ("model", "reviser"), a policy gradient from ("model",).
    """
    prompt = len(trajectory.prompt_ids)
    tokens, mask, logprobs = list(trajectory.prompt_ids), [False] * prompt, [0.0] * prompt
    for segment in trajectory.segments:
        n = len(segment.token_ids)
        tokens += segment.token_ids
        mask += [segment.source in sources] * n
        logprobs += segment.logprobs or [0.0] * n
    token_ids = np.asarray(tokens, np.int32)
    assert tuple(token_ids.tolist()) == trajectory.token_ids, f"trajectory {trajectory.id}: not the served sequence"
    return TrainingSequence(
        trajectory.id, token_ids, np.asarray(mask, np.bool_), np.asarray(logprobs, np.float32), advantage
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences; every array is [R, T] (NumPy's, until a step moves it), entry [r, t] speaks of token t itself.

    Token t is predicted from token t-1 of its segment, so the first token of a segment bears no loss.
    tokens: int32.  positions: int32, from 0 in each segment.  segment_ids: int32, from 1; 0 is padding.
    loss_mask: bool.  advantages: float32.  sampler_logprobs: float32, 0 where the sampler gave none.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    loss_mask: jax.Array
    advantages: jax.Array
    sampler_logprobs: jax.Array

    def take(self, rows: np.ndarray | slice) -> Self:
        """The batch of these rows."""
        return dataclasses.replace(self, **{name: array[rows] for name, array in vars(self).items()})


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `capacity`: longest first, each into the first bin with room.

    Ties keep their order.  Uses at most 11/9 of the fewest bins, plus 6/9 (Dósa, 2007).
    """
    bins: list[list[int]] = []
    free = np.full(len(lengths), capacity)
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        chosen = int(np.argmax(free >= lengths[index]))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        free[chosen] -= lengths[index]
    return bins


def pack(sequences: Iterable[TrainingSequence], length: int, *, multiple: int = 1, rows: int | None = None) -> Batch:
    """Rows of `length` tokens, several sequences each, padded with empty rows to a fixed shape.

    The number of rows is `rows` where it is given (ValueError if they do not suffice), otherwise
    the least `multiple` that suffices: few shapes, so few compilations.  The same sequences in the
    same order give the same batch.  ValueError names a sequence longer than `length`.
    """
    sequences = list(sequences)
    if not sequences:
        raise ValueError("no sequences to pack: the data, or what was selected from it, is empty")
    for sequence in sequences:
        if len(sequence) > length:
            raise ValueError(f"sequence {sequence.name}: {len(sequence)} tokens do not fit into rows of {length}; "
                             "leave it out or make the rows longer")  # fmt: skip
    bins = first_fit_decreasing([len(s) for s in sequences], length)
    if rows is None:
        rows = -(-len(bins) // multiple) * multiple
    elif len(bins) > rows:
        raise ValueError(f"{len(sequences)} sequences need {len(bins)} rows of {length} tokens, more than {rows}")

    arrays: dict[str, Any] = {name: np.zeros((rows, length), dtype) for name, dtype in DTYPES.items()}
    for row, members in enumerate(bins):
        start = 0
        for segment, index in enumerate(members, start=1):
            sequence = sequences[index]
            end = start + len(sequence)
            values = {
                "tokens": sequence.token_ids,
                "positions": np.arange(len(sequence)),
                "segment_ids": segment,
                "loss_mask": sequence.loss_mask,
                "advantages": sequence.advantage,
                "sampler_logprobs": sequence.logprobs,
            }
            for name, value in values.items():
                arrays[name][row, start:end] = value
            start = end
    return Batch(**arrays)
