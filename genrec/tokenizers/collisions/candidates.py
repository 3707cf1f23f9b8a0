"""The collision policy `first_unused`: items that share a semantic ID choose among candidates.

IDGenRec's way to unique textual ids (2403.19021). It knows codes, item ids and a function that
proposes candidates, not how they are made.

Shapes: N items, R rows asked for, G candidates per item, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from genrec.errors import UserError
from genrec.item_index import END
from genrec.runtime import get_logger
from genrec.tokenizers.collisions.numbering import IntArray, Unique, suffix

log = get_logger(__name__)
Candidates = Callable[[IntArray, int], IntArray | None]
"""Rows (R,) and a round 0, 1, ... -> semantic IDs (R, G, L'), best first; None: no more rounds."""


def first_unused(
    codes_NL: IntArray,
    codebook_sizes: Sequence[int],
    item_ids: Sequence[str],
    *,
    candidates: Candidates | None = None,
    reserve: int = 0,
) -> Unique:
    """Give each item that came too late the first of its candidates that nobody has.

    In the order of item ids: first every item takes its own semantic ID if it is free, so that an
    item without a collision keeps it; then the others take candidates, round after round; what is
    left at last is numbered by `suffix`.

    Args:
        codes_NL: codes with duplicates, `END` after the last code of a shorter semantic ID.
        codebook_sizes: (V,) * L.
        item_ids: N ids.
        candidates: proposes semantic IDs for rows; `Textual.collision_policy` supplies it.
        reserve: see `suffix`.

    Returns:
        codes (N, L') int32 and (V',) * L'; L' > L if a candidate is longer than L.

    Raises:
        UserError: no candidates.
    """
    if candidates is None:
        raise UserError(
            "collisions 'first_unused': this tokenizer proposes one semantic ID per item, expected "
            "several (tokenizer.name=textual). Use collisions='extra_level'."
        )
    chosen: list[tuple[int, ...]] = [_without_end(row) for row in np.asarray(codes_NL).tolist()]
    taken: set[tuple[int, ...]] = set()
    late: list[int] = []
    for row in sorted(range(len(item_ids)), key=lambda row: item_ids[row]):
        late.extend([row] if chosen[row] in taken else [])
        taken.add(chosen[row])
    colliding, rounds = len(late), 0
    while late and (proposed := candidates(np.array(late), rounds)) is not None:
        rounds += 1
        late = [
            row
            for row, options in zip(late, proposed.tolist(), strict=True)
            if not _take(row, options, chosen, taken)
        ]
    if colliding:
        log.info(
            "collisions: %d items came too late for their semantic ID; %d took another one within "
            "%d round(s), %d are numbered.", colliding, colliding - len(late), rounds, len(late),
        )  # fmt: skip
    width = max([codes_NL.shape[1], *map(len, chosen)])
    codes = np.full((len(chosen), width), END, dtype=np.int32)
    for place, row_codes in enumerate(chosen):
        codes[place, : len(row_codes)] = row_codes
    size = max(codebook_sizes, default=1)
    return suffix(codes, (size,) * width, item_ids, reserve=reserve)


def _take(
    row: int,
    options: list[list[int]],
    chosen: list[tuple[int, ...]],
    taken: set[tuple[int, ...]],
) -> bool:
    """Give a row the first option that is free; return whether there was one."""
    for option in map(_without_end, options):
        if option and option not in taken:
            taken.add(option)
            chosen[row] = option
            return True
    return False


def _without_end(codes: Sequence[int]) -> tuple[int, ...]:
    codes = list(codes)
    return tuple(codes[: codes.index(END)] if END in codes else codes)
