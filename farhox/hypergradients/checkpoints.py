"""Which states of an inner training to store for the way back, so that everything stored fits a number of bytes."""

from __future__ import annotations

import math

# Levels of checkpoints at most. A thousand times as many steps as states take five.
_LEVELS = 12


def segment_lengths(steps: int, state_bytes: int, kept_bytes: int, memory: float) -> list[int]:
    """Steps between the stored states of each level, the outermost first; none where all states are stored.

    Each level costs the inner training once more, so there are as few as possible. A segment of the innermost level has
    all its states stored, with what is kept of each of its steps; a segment of another level the first states of the
    segments in it.

    Args:
        steps: Positive int, the differentiated steps T.
        state_bytes: Positive int, an inner state.
        kept_bytes: Int, what of a step is worth keeping beside its state, where there is room for it.
        memory: Positive number of bytes for everything that is stored at a time.

    Raises:
        ValueError: If nothing fits. The least number of bytes is named.
    """
    least = math.inf
    for levels in range(_LEVELS):
        # With everything kept that is worth it if that fits, else with as few states as possible, and what is left.
        for of_step in (kept_bytes, 0):
            lengths = _balanced(steps, levels, state_bytes, of_step)
            stored = stored_bytes(steps, lengths, state_bytes, of_step)
            if stored <= memory:
                return lengths
            least = min(least, stored)
    raise ValueError("memory must hold the states that are stored of the inner training with "
                     f"checkpoint_every='memory', at least {least} bytes for {steps} steps with states of "
                     f"{state_bytes} bytes. Received: memory={memory}")


def stored_bytes(steps: int, lengths: list[int], state_bytes: int, kept_bytes: int) -> int:
    """Bytes that are stored at a time: states of every level, and what is kept of the steps of one segment."""
    lengths = [steps, *lengths]
    first_states = sum(-(-length // shorter) for length, shorter in zip(lengths, lengths[1:]))
    return (first_states + lengths[-1] + 1) * state_bytes + lengths[-1] * kept_bytes


def _balanced(steps, levels, state_bytes, kept_bytes):
    """The lengths of `levels` levels that take the least bytes: as many segments in each, up to rounding.

    A step of the innermost segment takes more than a state of another level: that segment is as much shorter.
    """
    ratio = (state_bytes + kept_bytes) / state_bytes
    lengths, length = [], steps
    for level in range(levels, 0, -1):
        # For x segments on each level, steps = x^(levels + 1) / ratio.
        segments = max(1.0, (length * ratio) ** (1 / (level + 1)))
        length = min(length, max(1, math.ceil(length / segments)))
        lengths.append(length)
    return lengths
