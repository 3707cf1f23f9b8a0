"""Does a tokenizer keep its contract? Subclass `TokenizerContract`, set `config`, and run it.

It knows no test runner: plain `test_` methods with asserts. It checks the contract, not how good
the codes are.

Shapes: N items, L levels, E embedding width.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from genrec.artifacts import fingerprint, read_manifest
from genrec.config import parse, parse_component
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.interactions import TRAIN
from genrec.data.synthetic import planted
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

NUM_ITEMS, NUM_HELD_BACK = 96, 8


class TokenizerContract:
    """What every tokenizer must do, whatever its codes are.

    Set `config` to a section as YAML would give it, small enough for 88 items in a second or two;
    set `tokenizer_class` for a class that is not in `TOKENIZERS`.
    """

    config: ClassVar[dict[str, Any]]
    tokenizer_class: ClassVar[type[ItemTokenizer] | None] = None

    def make(self, **changes: Any) -> ItemTokenizer:
        """Return an unfitted tokenizer of `config` with some values changed."""
        section = {**self.config, **changes}
        if self.tokenizer_class is not None:
            cls = self.tokenizer_class
            return cls(parse(cls.Config, section, path="tokenizer"))
        cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
        return cls(config)

    def world(self) -> tuple[Catalog, Catalog, Interactions]:
        """Return items to fit (88, planted on a tree), items held back (8), and interactions."""
        data: Dataset = planted(NUM_ITEMS, num_users=40, seed=3, branching=3)
        rows = np.arange(NUM_ITEMS)
        kept = NUM_ITEMS - NUM_HELD_BACK
        events = data.interactions
        interactions = Interactions(
            events.item_rows % kept, events.offsets, events.timestamps, events.splits, kept
        )
        return data.catalog.select(rows[:kept]), data.catalog.select(rows[kept:]), interactions

    def fitted(self, **changes: Any) -> ItemTokenizer:
        """Return a tokenizer fitted on the world's first catalogue."""
        catalog, _, interactions = self.world()
        return self.make(**changes).fit(catalog, interactions.training())

    def test_codes_have_their_shape_type_and_range(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        codes, sizes = tokenizer.encode(catalog), tokenizer.codebook_sizes
        assert codes.dtype == np.int32
        assert codes.shape == (len(catalog), len(sizes))
        assert all(type(size) is int and size >= 1 for size in sizes)
        assert (codes >= 0).all() and (codes < np.array(sizes)).all()

    def test_the_same_seed_gives_the_same_codes(self) -> None:
        catalog, _, _ = self.world()
        first, second = self.fitted(), self.fitted()
        assert np.array_equal(first.encode(catalog), second.encode(catalog))
        assert _digest(first) == _digest(second)

    def test_encode_is_pure(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        before = _digest(tokenizer), _vectors_digest(catalog)
        codes = tokenizer.encode(catalog)
        assert np.array_equal(codes, tokenizer.encode(catalog))
        assert (_digest(tokenizer), _vectors_digest(catalog)) == before

    def test_codes_of_an_item_depend_on_that_item_alone(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        codes = tokenizer.encode(catalog)
        rows = np.random.default_rng(0).permutation(len(catalog))[:17]
        assert np.array_equal(tokenizer.encode(catalog.select(rows)), codes[rows])
        assert tokenizer.encode(catalog.select([])).shape == (0, codes.shape[1])

    def test_unseen_items_get_codes(self) -> None:
        _, unseen, _ = self.world()
        tokenizer = self.fitted()
        if not tokenizer.codes_new_items:
            _expect_user_error(lambda: tokenizer.encode(unseen))
            return
        codes = tokenizer.encode(unseen)
        assert codes.shape == (len(unseen), len(tokenizer.codebook_sizes))
        assert (codes >= 0).all() and (codes < np.array(tokenizer.codebook_sizes)).all()

    def test_held_out_interactions_change_nothing(self) -> None:
        catalog, _, events = self.world()
        held_out = events.splits != TRAIN
        items = events.item_rows.copy()
        items[held_out] = np.random.default_rng(1).permutation(items[held_out])
        shuffled = Interactions(
            items, events.offsets, events.timestamps, events.splits, events.num_items
        )
        one, other = (self.make().fit(catalog, e.training()) for e in (events, shuffled))
        assert _digest(one) == _digest(other)

    def test_a_loaded_tokenizer_is_the_saved_one(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        again = self.make().load_state(tokenizer.state())
        assert _digest(again) == _digest(tokenizer)
        assert again.codebook_sizes == tokenizer.codebook_sizes
        assert np.array_equal(again.encode(catalog), tokenizer.encode(catalog))

    def test_an_artifact_holds_the_tokenizer(self) -> None:
        if self.tokenizer_class is not None:
            return  # artifacts are read through the registry
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder) / "tokenizer", {"vectors": "abc"})
            manifest = read_manifest(Path(folder) / "tokenizer", kind="tokenizer")
            loaded = ItemTokenizer.load(Path(folder) / "tokenizer")
        assert manifest["upstream"] == {"vectors": "abc"}
        assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
        assert np.array_equal(loaded.encode(catalog), tokenizer.encode(catalog))

    def test_an_index_is_a_bijection_and_insertion_keeps_codes(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
        assert list(index.item_ids) == catalog.item_ids
        assert np.array_equal(index.rows_of_codes(index.codes), np.arange(len(catalog)))
        assert np.array_equal(index.codes[:, :-1], tokenizer.encode(catalog))
        half = index.remove(catalog.item_ids[40:])
        grown = half.add(catalog.item_ids[40:], index.codes[40:])
        assert np.array_equal(grown.codes, index.codes)

    def test_codes_decode_to_vectors(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        codes = tokenizer.encode(catalog)
        if not tokenizer.decodes:
            _expect_user_error(lambda: tokenizer.decode(codes))
            return
        inputs, decoded = tokenizer.inputs(catalog), tokenizer.decode(codes)
        assert decoded.dtype == np.float32 and decoded.shape == inputs.shape
        assert np.isfinite(decoded).all()
        shuffled = tokenizer.decode(np.random.default_rng(0).permutation(codes))
        assert np.square(inputs - decoded).sum() < np.square(inputs - shuffled).sum()

    def test_an_unfitted_tokenizer_says_so(self) -> None:
        catalog, _, _ = self.world()
        _expect_user_error(lambda: self.make().encode(catalog))
        _expect_user_error(lambda: self.make().state())


def _digest(tokenizer: ItemTokenizer) -> str:
    state = tokenizer.state()
    return fingerprint(sorted(state), *(state[name] for name in sorted(state)))


def _vectors_digest(catalog: Catalog) -> str:
    return fingerprint(catalog.vectors if catalog.vectors is not None else np.empty(0))


def _expect_user_error(call: Any) -> None:
    try:
        call()
    except UserError as error:
        assert str(error)
        return
    raise AssertionError("expected a UserError")
