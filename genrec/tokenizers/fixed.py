"""Which codes did this item get when the tokenizer was fitted? The base of atomic identifiers.

For methods that number the items of a catalogue instead of computing codes from what an item is: an
item that was not there has no codes. How items are numbered is the business of the methods
(`atomic.py`, `spectral.py`); `hybrid.py` keeps collaborative vectors in the same kind of table.

Shapes: N fitted items, M encoded items, L levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from genrec.artifacts import pack_strings, unpack_strings
from genrec.data.interactions import TRAIN
from genrec.errors import UserError
from genrec.tokenizers.base import MAX_NAMED, IntArray, ItemTokenizer, not_fitted

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions


class KnownItems:
    """A table with one row per fitted item, in the order of ids as strings.

    Args:
        item_ids: N unique ids, any order.
        values: (N, ...) one row per id, in the same order.
    """

    def __init__(self, item_ids: Sequence[str], values: np.ndarray) -> None:
        order = id_order(item_ids)
        self.item_ids = [item_ids[row] for row in order]
        self.values = np.ascontiguousarray(values[order])
        self._rows = {item: row for row, item in enumerate(self.item_ids)}

    def take(self, item_ids: Sequence[str], *, name: str) -> np.ndarray:
        """Return the values (M, ...) of these items.

        Raises:
            UserError: items that were not fitted, with their ids.
        """
        rows = [self._rows.get(item, -1) for item in item_ids]
        unknown = [item for item, row in zip(item_ids, rows, strict=True) if row < 0]
        if unknown:
            shown = ", ".join(map(repr, unknown[:MAX_NAMED]))
            raise UserError(
                f"{name}: {len(unknown)} item(s) were not there when it was fitted: {shown}"
                f"{' ...' if len(unknown) > MAX_NAMED else ''}. It numbers the items of one "
                "catalogue and has no codes for others. Fit it again with them, or use a tokenizer "
                "that codes new items (see docs/tokenizers.md)."
            )
        return self.values[np.array(rows, dtype=np.int64)]

    def state(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return ids and values as arrays."""
        encoded, offsets = pack_strings(self.item_ids)
        return {
            f"{prefix}item_ids": encoded,
            f"{prefix}item_id_offsets": offsets,
            f"{prefix}values": self.values,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray], prefix: str = "") -> KnownItems:
        """Return the table that `state` described."""
        ids = unpack_strings(state[f"{prefix}item_ids"], state[f"{prefix}item_id_offsets"])
        return cls(ids, np.asarray(state[f"{prefix}values"]))


class FixedCodes(ItemTokenizer):
    """Base of tokenizers whose codes are fixed, item by item, when they are fitted.

    A subclass says in `number_items` which item gets which codes.

    Args:
        config: the subclass's `Config`.
    """

    decodes: ClassVar[bool] = False
    codes_new_items: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._known: KnownItems | None = None
        self._sizes: tuple[int, ...] = ()

    @abstractmethod
    def number_items(
        self, item_ids: list[str], catalog: Catalog, interactions: Interactions | None
    ) -> tuple[IntArray, tuple[int, ...]]:
        """Return the codes (N, L) of the catalogue's items and the L sizes of the levels.

        Args:
            item_ids: N ids, at least one, in row order.
            catalog: the items.
            interactions: the training split, or None.
        """

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Give each item its codes.

        Raises:
            UserError: no items, or interactions that the method needs and cannot use.
        """
        if not len(catalog):
            raise UserError(f"{self.name}: got a catalogue of 0 items, expected at least 1.")
        codes_NL, sizes = self.number_items(catalog.item_ids, catalog, interactions)
        self._known = KnownItems(catalog.item_ids, codes_NL.astype(np.int32))
        self._sizes = tuple(map(int, sizes))
        return self

    def encode(self, catalog: Catalog) -> IntArray:
        """Return the codes (M, L) int32 that these items were given.

        Raises:
            UserError: an item that was not fitted.
        """
        return self._fitted().take(catalog.item_ids, name=self.name)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        self._fitted()
        return self._sizes

    def state(self) -> dict[str, np.ndarray]:
        """Return the items' ids and codes, and the sizes of the levels."""
        sizes = np.array(self._sizes, dtype=np.int64)
        return {**self._fitted().state(), "codebook_sizes": sizes}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        self._known = KnownItems.of_state(state)
        self._sizes = tuple(np.asarray(state["codebook_sizes"]).tolist())
        return self

    def _fitted(self) -> KnownItems:
        if self._known is None:
            raise not_fitted(type(self).__name__)
        return self._known


def id_order(item_ids: Sequence[str]) -> IntArray:
    """Return the rows in the order of their ids as strings, which no reordering of rows changes."""
    return np.array(sorted(range(len(item_ids)), key=lambda row: item_ids[row]), dtype=np.int64)


def training_interactions(
    interactions: Interactions | None, catalog: Catalog, *, name: str
) -> Interactions:
    """Return interactions that codes may be fitted on.

    Raises:
        UserError: none, of another catalogue, or validation and test interactions among them.
    """
    if interactions is None or not len(interactions):
        raise UserError(
            f"{name}: got no training interactions, which it numbers the items by. Pass "
            "fit(catalog, interactions.training()), or check the data set's split."
        )
    if interactions.num_items != len(catalog):
        raise UserError(
            f"{name}: the interactions are of {interactions.num_items} items, the catalogue has "
            f"{len(catalog)}. Use the two of one data set."
        )
    held_out = int(np.count_nonzero(interactions.splits != TRAIN))
    if held_out:
        raise UserError(
            f"{name}: got {held_out} validation or test interactions, which leak into the codes. "
            "Pass interactions.training()."
        )
    return interactions
