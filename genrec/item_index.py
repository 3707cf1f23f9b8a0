"""ItemIndex: the bijection between item ids, code rows and model tokens.

The hub of the framework: everything downstream stores its fingerprint. It knows nothing about how
codes were learned; tokenizers and collision policies meet it through the protocols below.

Shapes: N items, M queried items, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from genrec.artifacts import fingerprint, load_artifact, save_artifact
from genrec.errors import UserError

IntArray = np.ndarray
MISSING_ROW = -1
END = 0
"""The code that ends a semantic ID in a shared vocabulary; everything after it is END too."""


def level_offsets(codebook_sizes: Sequence[int], shared_vocabulary: bool) -> IntArray:
    """Return the first token of each level relative to the first code token, (L,) int64.

    Levels that share one vocabulary all start at 0; else each level has a range of its own.
    """
    if shared_vocabulary:
        return np.zeros(len(codebook_sizes), dtype=np.int64)
    return np.concatenate([[0], np.cumsum(codebook_sizes)[:-1]]).astype(np.int64)


class CollisionPolicy(Protocol):
    """Turns code rows with duplicates into unique ones (see `genrec.tokenizers.collisions`)."""

    def __call__(
        self, codes_NL: IntArray, codebook_sizes: Sequence[int], item_ids: Sequence[str]
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Return unique codes (N, L') and the sizes of their L' levels."""


class CodesItems(Protocol):
    """What `ItemIndex.build` needs of a fitted tokenizer."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Sizes of the L levels."""

    @property
    def shared_vocabulary(self) -> bool:
        """Whether all levels draw from one vocabulary."""

    def encode(self, catalog: Any) -> IntArray:
        """Return codes (M, L)."""

    def collision_policy(self, name: str, catalog: Any = None) -> CollisionPolicy:
        """Return the policy registered under `name`, able to weigh distances of these items."""


@dataclass(frozen=True, eq=False)
class ItemIndex:
    """Immutable, fingerprinted bijection item id <-> row <-> codes <-> tokens.

    Args:
        item_ids: N unique strings; the position is the item's row.
        codes: (N, L) int32, unique rows, 0 <= codes[:, l] < codebook_sizes[l].
        codebook_sizes: L sizes >= 1.
        shared_vocabulary: all levels draw from one vocabulary (words, sub-words), so that a code
            means the same at every level. Semantic IDs may then be shorter than L: code 0 ends one
            (`END`) and fills the rest of its row. All sizes are equal.

    Raises:
        UserError: lengths that differ, duplicate ids or rows, codes out of range, or codes after
            the end of a semantic ID.
    """

    item_ids: tuple[str, ...]
    codes: IntArray
    codebook_sizes: tuple[int, ...]
    shared_vocabulary: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_ids", tuple(str(i) for i in self.item_ids))
        object.__setattr__(self, "codebook_sizes", tuple(int(k) for k in self.codebook_sizes))
        codes = np.ascontiguousarray(self.codes, dtype=np.int32)
        codes.setflags(write=False)
        object.__setattr__(self, "codes", codes)
        self._check()

    def _check(self) -> None:
        expected = (len(self.item_ids), len(self.codebook_sizes))
        if self.codes.shape != expected:
            raise UserError(
                f"ItemIndex: got codes of shape {self.codes.shape}, expected {expected} "
                "(items, levels)."
            )
        if len(self._row_by_id) != len(self.item_ids):
            raise UserError("ItemIndex: item ids repeat; expected each item once.")
        sizes = np.asarray(self.codebook_sizes)
        if self.codes.size and ((self.codes < 0) | (self.codes >= sizes)).any():
            raise UserError(
                f"ItemIndex: codes lie outside their levels' sizes {self.codebook_sizes}."
            )
        if self.shared_vocabulary:
            self._check_ends()
        if len(np.unique(self.codes, axis=0)) != len(self.codes):
            raise UserError(
                "ItemIndex: several items share one semantic ID. Resolve collisions first "
                "(collisions='extra_level')."
            )

    def _check_ends(self) -> None:
        if len(set(self.codebook_sizes)) > 1:
            raise UserError(
                f"ItemIndex: got levels of sizes {self.codebook_sizes}, expected equal ones in a "
                "shared vocabulary."
            )
        ended = self.codes == END
        if self.codes.size and (ended[:, 0].any() or (ended[:, :-1] & ~ended[:, 1:]).any()):
            row = int(np.flatnonzero(ended[:, 0] | (ended[:, :-1] & ~ended[:, 1:]).any(1))[0])
            raise UserError(
                f"ItemIndex: the semantic ID of item {self.item_ids[row]!r} is empty or goes on "
                f"after its end (code {END}): {self.codes[row].tolist()}. Expected at least one "
                f"code, then only {END}s once it has ended."
            )

    @classmethod
    def build(
        cls, tokenizer: CodesItems, catalog: Any, *, collisions: str | CollisionPolicy
    ) -> ItemIndex:
        """Encode a catalogue and make the codes unique.

        Args:
            tokenizer: a fitted tokenizer.
            catalog: what it encodes; its `item_ids` become the rows.
            collisions: a policy, or the name of one.
        """
        codes = tokenizer.encode(catalog)
        policy = (
            tokenizer.collision_policy(collisions, catalog)
            if isinstance(collisions, str)
            else collisions
        )
        codes, sizes = policy(codes, tokenizer.codebook_sizes, catalog.item_ids)
        shared = tokenizer.shared_vocabulary
        return cls(tuple(catalog.item_ids), codes, tuple(sizes), shared)

    @cached_property
    def _row_by_id(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.item_ids)}

    @cached_property
    def _row_by_codes(self) -> dict[tuple[int, ...], int]:
        return {tuple(codes): row for row, codes in enumerate(self.codes.tolist())}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of ids, codes, sizes and whether levels share a vocabulary."""
        shared = ["shared vocabulary"] if self.shared_vocabulary else []
        return fingerprint(list(self.item_ids), self.codes, list(self.codebook_sizes), *shared)

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """Number of codes of an item (L)."""
        return len(self.codebook_sizes)

    @property
    def num_tokens(self) -> int:
        """Size of the token range of all levels together."""
        if self.shared_vocabulary:
            return max(self.codebook_sizes, default=0)
        return sum(self.codebook_sizes)

    @cached_property
    def level_offsets(self) -> IntArray:
        """First token of each level relative to the first code token, (L,) int64."""
        return level_offsets(self.codebook_sizes, self.shared_vocabulary)

    def rows_of(
        self, item_ids: Iterable[str], *, missing: Literal["error", "skip", "mark"] = "error"
    ) -> IntArray:
        """Return the rows of item ids, int64.

        Args:
            item_ids: external ids.
            missing: "error" raises with the unknown ids, "skip" leaves them out, "mark" puts -1.
        """
        ids = [str(i) for i in item_ids]
        rows = np.array([self._row_by_id.get(i, MISSING_ROW) for i in ids], dtype=np.int64)
        if missing == "skip":
            return rows[rows >= 0]
        if missing == "error" and (rows < 0).any():
            unknown = [i for i, row in zip(ids, rows, strict=True) if row < 0]
            shown = ", ".join(repr(i) for i in unknown[:10])
            raise UserError(
                f"{len(unknown)} item(s) not in the catalogue: {shown}"
                f"{' ...' if len(unknown) > 10 else ''}. Expected ids as in the raw data."
            )
        return rows

    def codes_of(
        self, item_ids: Iterable[str], *, missing: Literal["error", "skip"] = "error"
    ) -> IntArray:
        """Return the codes (M, L) of item ids; unknown ones raise or are left out."""
        return self.codes[self.rows_of(item_ids, missing=missing)]

    def rows_of_codes(self, codes_ML: IntArray) -> IntArray:
        """Return the rows (M,) int64 of semantic IDs, -1 where no item has that semantic ID."""
        found = [
            self._row_by_codes.get(tuple(c), MISSING_ROW) for c in np.asarray(codes_ML).tolist()
        ]
        return np.array(found, dtype=np.int64)

    def to_tokens(self, codes_ML: IntArray, first_token: int) -> IntArray:
        """Return tokens: first_token + level offset + code (the only home of level offsets)."""
        return np.asarray(codes_ML, dtype=np.int64) + self.level_offsets + first_token

    def tokens(self, first_token: int = 0) -> IntArray:
        """Return the tokens of all items, (N, L) int64."""
        return self.to_tokens(self.codes, first_token)

    def add(self, item_ids: Sequence[str], codes: IntArray) -> ItemIndex:
        """Return an index with items appended; no existing row or code changes.

        Args:
            item_ids: M new ids.
            codes: (M, L), none of them taken, within the levels' sizes.

        Raises:
            UserError: ids or codes that are taken, codes out of range, or lengths that differ.
        """
        codes = np.asarray(codes, dtype=np.int32)
        if codes.shape != (len(item_ids), self.num_levels):
            raise UserError(
                f"ItemIndex.add: got codes of shape {codes.shape}, expected "
                f"{(len(item_ids), self.num_levels)} (items, levels)."
            )
        return ItemIndex(
            (*self.item_ids, *map(str, item_ids)),
            np.concatenate([self.codes, codes]),
            self.codebook_sizes,
            self.shared_vocabulary,
        )

    def remove(self, item_ids: Iterable[str]) -> ItemIndex:
        """Return an index without these items; the others keep their codes, rows close up."""
        gone = set(self.rows_of(item_ids).tolist())
        keep = [row for row in range(len(self)) if row not in gone]
        return ItemIndex(
            tuple(self.item_ids[row] for row in keep),
            self.codes[keep],
            self.codebook_sizes,
            self.shared_vocabulary,
        )

    def save(
        self,
        path: str | Path,
        *,
        upstream: dict[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Write the index as an artifact folder.

        Args:
            path: folder to create or replace.
            upstream: fingerprints of what it was made from.
            config: how it was made (JSON types); not part of the index's own fingerprint.
            arrays: more to keep beside the codes.
        """
        save_artifact(
            path,
            kind="index",
            arrays={**(arrays or {}), "codes": self.codes},
            config=config,
            upstream=upstream,
            extra={
                "item_ids": list(self.item_ids),
                "codebook_sizes": list(self.codebook_sizes),
                "shared_vocabulary": self.shared_vocabulary,
                "index_fingerprint": self.fingerprint,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> ItemIndex:
        """Read an index artifact; raises `ArtifactError` if it is damaged."""
        artifact = load_artifact(path, kind="index")
        return cls(
            tuple(artifact.extra["item_ids"]),
            artifact.arrays["codes"],
            tuple(artifact.extra["codebook_sizes"]),
            artifact.extra.get("shared_vocabulary", False),
        )
