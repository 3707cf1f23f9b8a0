"""What are the features of an item, and which token is each? Codes of a quantizer, values of
attributes, and a bucket that tells equal items apart. It merges nothing.

Shapes: N fitted items, M encoded items, F features of an item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from genrec.artifacts import pack_strings, unpack_strings
from genrec.runtime import get_logger
from genrec.tokenizers.base import IntArray
from genrec.tokenizers.text.attributes import attribute_values

if TYPE_CHECKING:
    from genrec.data import Catalog

log = get_logger(__name__)

MAX_NAMED = 5


class FeatureSets:
    """The features of an item as tokens 1, 2, ...: codes, attribute values, bucket.

    Args:
        level_sizes: codes of each level of a quantizer.
        attributes: columns of the catalogue.
        values: per attribute, the values that the fitted items have, sorted.
        max_values: per attribute, how many of them an item can have.
        num_buckets: values of the bucket feature; 0: there is none.
        moved: buckets of the items whose bucket is not the one that their id hashes to.
    """

    def __init__(
        self,
        level_sizes: Sequence[int],
        attributes: Sequence[str],
        values: Sequence[Sequence[str]],
        max_values: Sequence[int],
        num_buckets: int,
        moved: dict[str, int],
    ) -> None:
        self.attributes, self.values, self.max_values = attributes, values, max_values
        self.num_buckets, self.moved = num_buckets, moved
        self.level_firsts = 1 + np.cumsum([0, *level_sizes])
        token = int(self.level_firsts[-1])
        self._tokens: list[dict[str, int]] = []
        for column in values:
            self._tokens.append({value: token + place for place, value in enumerate(column)})
            token += len(column)
        self._first_bucket = token
        self.end = token + num_buckets
        """The first token that is no feature."""
        self.width = len(level_sizes) + sum(max_values) + (num_buckets > 0)
        """The most features that an item can have, F."""

    @classmethod
    def of(
        cls,
        codes_NL: IntArray,
        level_sizes: Sequence[int],
        catalog: Catalog,
        *,
        attributes: Sequence[str],
        max_values: int,
        num_buckets: int,
    ) -> FeatureSets:
        """Number the features of a catalogue and spread equal items over the buckets.

        Raises:
            DataError: no such column.
        """
        columns = [attribute_values(catalog, name, max_values) for name in attributes]
        values = [sorted({value for item in column for value in item}) for column in columns]
        most = [max(map(len, column), default=0) for column in columns]
        features = cls(level_sizes, attributes, values, most, num_buckets, {})
        if num_buckets:
            plain = features.encode(codes_NL, catalog)[:, :-1]
            features.moved = _spread(plain, catalog.item_ids, num_buckets)
        return features

    def encode(self, codes_ML: IntArray, catalog: Catalog) -> IntArray:
        """Return the features of items, (M, F) int32, in rising order, 0 where an item has fewer.

        Attribute values that no fitted item has are left out, and so are more values than any
        fitted item has. The bucket is in the last column.
        """
        tokens = np.zeros((len(catalog), self.width), np.int32)
        num_levels = codes_ML.shape[1]
        tokens[:, :num_levels] = codes_ML + self.level_firsts[:-1]
        for row, found in enumerate(self._attribute_tokens(catalog)):
            tokens[row, num_levels : num_levels + len(found)] = sorted(found)
        if self.num_buckets:
            tokens[:, -1] = [self._first_bucket + self._bucket(item) for item in catalog.item_ids]
        return tokens

    def _attribute_tokens(self, catalog: Catalog) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(len(catalog))]
        known = zip(self.attributes, self.max_values, self._tokens, strict=True)
        for name, limit, numbers in known:
            for row, item in zip(rows, attribute_values(catalog, name, limit), strict=True):
                row += [numbers[value] for value in item if value in numbers]
        return rows

    def _bucket(self, item_id: str) -> int:
        own = self.moved.get(item_id)
        return _hashed(item_id, self.num_buckets) if own is None else own

    def state(self) -> dict[str, np.ndarray]:
        """Return what `from_state` needs besides the settings, as arrays."""
        values, value_offsets = pack_strings([v for column in self.values for v in column])
        items, item_offsets = pack_strings(list(self.moved))
        return {
            "values": values,
            "value_offsets": value_offsets,
            "values_per_attribute": np.array([len(column) for column in self.values], np.int64),
            "max_values": np.array(self.max_values, np.int64),
            "moved_items": items,
            "moved_item_offsets": item_offsets,
            "moved_buckets": np.array(list(self.moved.values()), np.int64),
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, np.ndarray],
        level_sizes: Sequence[int],
        *,
        attributes: Sequence[str],
        num_buckets: int,
    ) -> FeatureSets:
        """Return the features that `state` described."""
        values = unpack_strings(state["values"], state["value_offsets"])
        bounds = np.cumsum([0, *state["values_per_attribute"]]).tolist()
        items = unpack_strings(state["moved_items"], state["moved_item_offsets"])
        return cls(
            level_sizes,
            attributes,
            [values[a:b] for a, b in pairwise(bounds)],
            state["max_values"].tolist(),
            num_buckets,
            dict(zip(items, state["moved_buckets"].tolist(), strict=True)),
        )


def _hashed(item_id: str, num_buckets: int) -> int:
    digest = hashlib.blake2b(item_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_buckets


def _spread(features_NF: IntArray, item_ids: Sequence[str], num_buckets: int) -> dict[str, int]:
    """Return the buckets of items that must leave theirs, so that equal items differ.

    In the order of ids, an item whose bucket another item with the same features has taken goes to
    the next free one. What does not fit is left to the collision policy, with a warning.
    """
    moved: dict[str, int] = {}
    taken: dict[bytes, set[int]] = {}
    left_over: list[str] = []
    for row in sorted(range(len(item_ids)), key=lambda row: item_ids[row]):
        item = item_ids[row]
        used = taken.setdefault(features_NF[row].tobytes(), set())
        if len(used) == num_buckets:
            left_over.append(item)
            continue
        wanted = bucket = _hashed(item, num_buckets)
        while bucket in used:
            bucket = (bucket + 1) % num_buckets
        used.add(bucket)
        if bucket != wanted:
            moved[item] = bucket
    if left_over:
        log.warning(
            "ActionPiece: %d item(s), e.g. %s, share all features with more items than there are "
            "buckets (%d); the collision policy tells them apart. Set a larger "
            "tokenizer.num_buckets, or check that the items have texts of their own.",
            len(left_over), ", ".join(map(repr, left_over[:MAX_NAMED])), num_buckets,
        )  # fmt: skip
    return moved
