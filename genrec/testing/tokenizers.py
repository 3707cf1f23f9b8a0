"""Does a tokenizer keep its contract? Subclass `TokenizerContract`, set `config`, and run it.

It knows no test runner: plain `test_` methods with asserts. It checks the contract, not how good
the codes are. Bad input has to end in a `UserError` or in valid codes, never in anything else.

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
from genrec.data.catalog import ITEM_ID
from genrec.data.interactions import TRAIN
from genrec.data.synthetic import planted
from genrec.errors import UserError
from genrec.item_index import END, ItemIndex
from genrec.tokenizers import COLLISIONS, TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

NUM_ITEMS, NUM_HELD_BACK = 96, 8


class TokenizerContract:
    """What every tokenizer must do, whatever its codes are.

    Set `config` to a section as YAML would give it, small enough for 88 items in a second or two;
    set `tokenizer_class` for a class that is not in `TOKENIZERS`.
    """

    config: ClassVar[dict[str, Any]]
    tokenizer_class: ClassVar[type[ItemTokenizer] | None] = None
    _fitted: ClassVar[dict[str, ItemTokenizer]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._fitted = {}

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

    def fit_again(self, **changes: Any) -> ItemTokenizer:
        """Return a tokenizer fitted on the world's first catalogue."""
        catalog, _, interactions = self.world()
        return self.make(**changes).fit(catalog, interactions.training())

    def fitted(self, **changes: Any) -> ItemTokenizer:
        """Return a fitted tokenizer, the same one to every test (it never changes)."""
        key = fingerprint({name: str(value) for name, value in changes.items()})
        if key not in self._fitted:
            self._fitted[key] = self.fit_again(**changes)
        return self._fitted[key]

    def test_codes_have_their_shape_type_and_range(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        codes = tokenizer.encode(catalog)
        assert codes.dtype == np.int32
        assert all(type(size) is int and size >= 1 for size in tokenizer.codebook_sizes)
        _check_codes(tokenizer, codes, len(catalog))

    def test_the_same_seed_gives_the_same_codes(self) -> None:
        catalog, _, _ = self.world()
        first, second = self.fitted(), self.fit_again()
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
        _check_codes(tokenizer, tokenizer.encode(unseen), len(unseen))

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
        _check_index(index, catalog)
        codes, num_levels = tokenizer.encode(catalog), len(tokenizer.codebook_sizes)
        _, group, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        kept = sizes[group.reshape(-1)] == 1 if tokenizer.shared_vocabulary else slice(None)
        assert np.array_equal(index.codes[kept, :num_levels], codes[kept])
        half = index.remove(catalog.item_ids[40:])
        grown = half.add(catalog.item_ids[40:], index.codes[40:])
        assert np.array_equal(grown.codes, index.codes)

    def test_every_collision_policy_ends_in_a_bijection_or_says_why_not(self) -> None:
        catalog, _, _ = self.world()
        tokenizer = self.fitted()
        order = np.random.default_rng(2).permutation(len(catalog))
        for policy in COLLISIONS:
            try:
                index = ItemIndex.build(tokenizer, catalog, collisions=policy)
            except UserError as error:
                assert policy != "extra_level" and str(error)
                continue
            _check_index(index, catalog)
            again = ItemIndex.build(tokenizer, catalog.select(order), collisions=policy)
            assert again.codebook_sizes == index.codebook_sizes, policy
            assert np.array_equal(again.codes_of(catalog.item_ids), index.codes), policy

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

    def test_it_reads_only_what_it_says_it_needs(self) -> None:
        catalog, _, interactions = self.world()
        training, expected = interactions.training(), self.fitted()
        needs = expected.needs
        assert needs <= {"vectors", "interactions", "texts"}
        bare = Catalog(
            catalog.table if "texts" in needs else catalog.table.select(ITEM_ID),
            catalog.vectors if "vectors" in needs else None,
        )
        found = self.make().fit(bare, training if "interactions" in needs else None)
        assert _digest(found) == _digest(expected)
        assert np.array_equal(found.encode(bare), expected.encode(catalog))

    def test_what_it_needs_and_does_not_get_is_an_error(self) -> None:
        catalog, _, interactions = self.world()
        training, needs = interactions.training(), self.fitted().needs
        lacking = {
            "vectors": (Catalog(catalog.table), training),
            "texts": (Catalog(catalog.table.select(ITEM_ID), catalog.vectors), training),
            "interactions": (catalog, None),
        }
        for name in needs:
            _expect_user_error(lambda name=name: self.make().fit(*lacking[name]))

    def test_vectors_with_nan_are_refused_with_the_item(self) -> None:
        catalog, _, interactions = self.world()
        if "vectors" not in self.fitted().needs:
            return
        assert catalog.vectors is not None
        vectors = catalog.vectors.copy()
        vectors[5, 0] = np.nan
        broken = catalog.with_vectors(vectors)
        for call in (
            lambda: self.make().fit(broken, interactions.training()),
            lambda: self.fitted().encode(broken),
        ):
            assert repr(catalog.item_ids[5]) in _expect_user_error(call)

    def test_equal_vectors_are_coded_or_refused(self) -> None:
        catalog, _, interactions = self.world()
        if "vectors" in self.fitted().needs:
            assert catalog.vectors is not None
            same = np.ones_like(catalog.vectors)
            self._coded_or_refused(catalog.with_vectors(same), interactions)

    def test_three_items_are_coded_or_refused(self) -> None:
        catalog, _, events = self.world()
        rows = (events.item_rows % 3).astype(np.int32)
        few = Interactions(rows, events.offsets, events.timestamps, events.splits, 3)
        self._coded_or_refused(catalog.select([0, 1, 2]), few)

    def test_items_without_text_are_coded_or_refused(self) -> None:
        import polars as pl

        catalog, _, interactions = self.world()
        if "texts" not in self.fitted().needs:
            return
        empty = pl.col(ITEM_ID).is_in(catalog.item_ids[:2])
        table = catalog.table.with_columns(
            pl.when(empty).then(None).otherwise(pl.col(name)).alias(name)
            for name in catalog.columns
        )
        self._coded_or_refused(Catalog(table, catalog.vectors), interactions)

    def test_levels_of_one_code_are_fine_or_refused(self) -> None:
        catalog, _, interactions = self.world()
        if "codebook_size" in type(self.fitted()).Config.model_fields:
            self._coded_or_refused(catalog, interactions, codebook_size=1)

    def _coded_or_refused(
        self, catalog: Catalog, interactions: Interactions, **changes: Any
    ) -> None:
        """Expect valid codes and a bijection, or a UserError that says something."""
        try:
            tokenizer = self.make(**changes).fit(catalog, interactions.training())
            codes = tokenizer.encode(catalog)
            index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
        except UserError as error:
            assert len(str(error)) > 20
            return
        _check_codes(tokenizer, codes, len(catalog))
        _check_index(index, catalog)


def _check_codes(tokenizer: ItemTokenizer, codes: np.ndarray, num_items: int) -> None:
    sizes = tokenizer.codebook_sizes
    assert codes.shape == (num_items, len(sizes))
    assert (codes >= 0).all() and (codes < np.array(sizes)).all()
    if tokenizer.shared_vocabulary:
        ended = codes == END
        assert len(set(sizes)) == 1, "levels of a shared vocabulary have one size"
        assert not ended[:, 0].any(), "a semantic ID has at least one code"
        assert (ended[:, :-1] <= ended[:, 1:]).all(), "after its end there are only ENDs"


def _check_index(index: ItemIndex, catalog: Catalog) -> None:
    assert list(index.item_ids) == catalog.item_ids
    assert np.array_equal(index.rows_of_codes(index.codes), np.arange(len(catalog)))


def _digest(tokenizer: ItemTokenizer) -> str:
    state = tokenizer.state()
    return fingerprint(sorted(state), *(state[name] for name in sorted(state)))


def _vectors_digest(catalog: Catalog) -> str:
    return fingerprint(catalog.vectors if catalog.vectors is not None else np.empty(0))


def _expect_user_error(call: Any) -> str:
    try:
        call()
    except UserError as error:
        assert str(error)
        return str(error)
    raise AssertionError("expected a UserError")
