"""Do feature sets merge by the paper's weights, and do tokens mean the features they came from?"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise, permutations
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.config import parse_component
from genrec.data import Catalog, Interactions
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import END, ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.action_piece import ActionPiece
from genrec.tokenizers.pieces.merging import PairCounts, learn_merges
from genrec.tokenizers.pieces.segmenting import merge_sequence, merge_set

QUANTIZER = {"name": "rqkmeans", "num_levels": 3, "codebook_size": 6}
SMALL: dict[str, Any] = {
    "name": "action_piece",
    "quantizer": QUANTIZER,
    "num_buckets": 16,
    "vocabulary_size": 90,
}


class TestActionPiece(TokenizerContract):
    config: ClassVar[dict[str, Any]] = SMALL


class TestActionPieceWithAttributes(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        **SMALL,
        "attributes": ["category"],
        "max_values": 2,
        "vocabulary_size": 140,
    }


def make(**changes: Any) -> ActionPiece:
    cls, config = parse_component(TOKENIZERS, {**SMALL, **changes}, path="tokenizer")
    return cls(config)


@pytest.fixture(scope="module")
def world():
    return planted(120, num_users=60, seed=1, branching=3)


def visits(num_items: int) -> Interactions:
    """Every item once, each by a user of its own."""
    rows = np.arange(num_items)
    zeros = np.zeros(num_items, np.int64)
    offsets = np.arange(num_items + 1)
    return Interactions(rows.astype(np.int32), offsets, zeros, zeros.astype(np.uint8), num_items)


@pytest.fixture(scope="module")
def fitted(world):
    return make(vocabulary_size=150).fit(world.catalog, world.interactions.training())


# -- weights, counts and merges ------------------------------------------------------------------


def weights_by_hand(sequences) -> dict[tuple[int, int], Fraction]:
    found: dict[tuple[int, int], Fraction] = {}
    for sequence in sequences:
        for tokens in sequence:
            for pair in combinations(sorted(tokens), 2):
                found[pair] = found.get(pair, Fraction(0)) + Fraction(2, len(tokens))
        for left, right in pairwise(sequence):
            for a in left:
                for b in right:
                    pair = (min(a, b), max(a, b))
                    found[pair] = found.get(pair, Fraction(0)) + Fraction(1, len(left) * len(right))
    return found


def weights_of(corpus: PairCounts) -> dict[tuple[int, int], Fraction]:
    return {corpus.pair(key): Fraction(n, corpus.unit) for key, n in corpus.counts.items()}


corpora = st.lists(
    st.lists(st.sets(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_first_counts_are_the_weights_of_the_paper(sequences):
    corpus = PairCounts([[sorted(s) for s in sequence] for sequence in sequences], 6)
    assert weights_of(corpus) == weights_by_hand(sequences)


@settings(max_examples=80, deadline=None)
@given(corpora)
def test_updated_counts_equal_counting_from_scratch(sequences):
    corpus = PairCounts([[sorted(s) for s in sequence] for sequence in sequences], 40)
    new = 7
    while corpus.counts and new < 40:
        key = max(corpus.counts, key=lambda k: (corpus.counts[k], -k))
        before = dict(corpus.counts)
        size = corpus.num_tokens()
        changes = corpus.merge(*corpus.pair(key), new)
        assert corpus.counts == corpus.recount()
        assert corpus.num_tokens() < size
        after = {k: before.get(k, 0) + changes.get(k, 0) for k in before.keys() | changes}
        assert {k: n for k, n in after.items() if n} == corpus.counts
        assert min(corpus.counts.values(), default=1) > 0
        new += 1


@settings(max_examples=50, deadline=None)
@given(corpora, st.integers(1, 12))
def test_the_lazy_heap_finds_the_heaviest_pair_every_time(sequences, num_merges):
    sets = [[sorted(s) for s in sequence] for sequence in sequences]
    merges = learn_merges(PairCounts(sets, 40), 7, num_merges)
    slow, expected = PairCounts(sets, 40), []
    while slow.counts and len(expected) < num_merges:
        key = min(slow.counts, key=lambda k: (-slow.counts[k], k))
        pair = slow.pair(key)
        if pair not in expected:
            expected.append(pair)
        slow.merge(*pair, 7 + expected.index(pair))
    assert merges == expected


def test_a_pair_in_a_set_becomes_a_token_of_the_set():
    corpus = PairCounts([[[1, 2, 3]], [[2, 1]]], 10)
    corpus.merge(1, 2, 9)
    assert corpus.sets == [[3, 9], [9]]


def test_a_pair_across_sets_becomes_the_token_of_the_slot_and_blocks_it():
    corpus = PairCounts([[[1, 2], [3, 4]]], 10)
    corpus.merge(2, 3, 9)
    assert corpus.sequences() == [[1, 9, 4]] and corpus.slots[0] == 9
    # The slot counts with both sides; what it parts does not count any more.
    assert weights_of(corpus) == {(1, 9): 1, (4, 9): 1}
    corpus.merge(4, 9, 10)  # the right set is empty now and takes the token
    assert corpus.sets == [[1], [10]] and corpus.slots[0] == 0
    assert weights_of(corpus) == {(1, 10): 1}
    corpus.merge(1, 10, 8)
    assert corpus.sequences() == [[8]] and not corpus.counts


def test_merges_go_from_left_to_right():
    corpus = PairCounts([[[1], [1], [1], [5]]], 10)
    corpus.merge(1, 1, 9)
    assert corpus.sequences() == [[9, 1, 5]]


def test_equal_weights_are_settled_by_the_smaller_tokens():
    assert learn_merges(PairCounts([[[3, 4]], [[1, 2]]], 10), 5, 2) == [(1, 2), (3, 4)]


# -- segmentation --------------------------------------------------------------------------------


def merge_slowly(tokens, ranks):
    tokens = list(tokens)
    while True:
        found = [
            (ranks[min(a, b), max(a, b)], place)
            for place, (a, b) in enumerate(pairwise(tokens))
            if (min(a, b), max(a, b)) in ranks
        ]
        if not found:
            return tokens
        new, place = min(found)
        tokens[place : place + 2] = [new]


@st.composite
def rules_and_tokens(draw):
    ranks: dict[tuple[int, int], int] = {}
    for _ in range(draw(st.integers(0, 12))):
        new = 6 + len(ranks)
        low, high = sorted(draw(st.tuples(st.integers(1, new - 1), st.integers(1, new - 1))))
        ranks.setdefault((low, high), new)
    return ranks, draw(st.lists(st.integers(1, 5), max_size=14))


@settings(max_examples=150, deadline=None)
@given(rules_and_tokens())
def test_fast_segmentation_equals_the_plain_loop(drawn):
    ranks, tokens = drawn
    assert merge_sequence(tokens, ranks) == merge_slowly(tokens, ranks)


def test_the_canonical_encoding_merges_anywhere_in_the_set_and_latest_first():
    ranks = {(1, 4): 10, (2, 10): 11}
    assert merge_set([1, 2, 3, 4], ranks) == [11, 3]
    assert merge_set([3, 5, 2], ranks) == [3, 5, 2]


def test_tokens_decode_to_exactly_the_set_under_every_permutation(world, fitted):
    features = fitted.features(world.catalog)
    codes = fitted.encode(world.catalog)
    for row in (0, 17, 63):
        wanted = sorted(features[row].tolist())
        assert sorted(sum(fitted.decode_tokens(codes[row].tolist()), ())) == wanted
        for order in permutations(range(len(wanted))):
            tokens = fitted.segment(features[row][None, list(order)], FixedOrder())
            assert sorted(sum(fitted.decode_tokens(tokens), ())) == wanted


class FixedOrder:
    """Stands in for a generator; leaves sets as they are."""

    def permutation(self, values):
        return values


def test_a_history_keeps_its_features_and_varies_with_the_draw(world, fitted):
    features = fitted.features(world.catalog)[world.interactions.user(3)]
    draws = [fitted.segment(features, np.random.default_rng(seed)) for seed in range(6)]
    for tokens in draws:
        assert sorted(sum(fitted.decode_tokens(tokens), ())) == sorted(features.ravel().tolist())
    assert len({tuple(tokens) for tokens in draws}) > 1
    assert draws[0] == fitted.segment(features, np.random.default_rng(0))


def test_tokens_span_neighbouring_items(world, fitted):
    """What makes it context-aware: some tokens hold features of two items."""
    rng = np.random.default_rng(0)
    features = fitted.features(world.catalog)
    spanning = 0
    for user in range(40):
        tokens = fitted.segment(features[world.interactions.user(user)], rng)
        for part in fitted.decode_tokens(tokens):
            levels = [np.searchsorted([1, 7, 13, 19], f, side="right") for f in part]
            spanning += len(levels) > len(set(levels))
    assert spanning > 0


# -- the tokenizer -------------------------------------------------------------------------------


def test_without_merges_the_tokens_are_the_plain_features(world):
    tokenizer = make(vocabulary_size=1 + 3 * 6 + 16).fit(
        world.catalog, world.interactions.training()
    )
    codes = tokenizer.encode(world.catalog)
    assert np.array_equal(codes, tokenizer.features(world.catalog))
    quantizer = tokenizer._quantizer.encode(world.catalog)
    assert np.array_equal(codes[:, :3], quantizer + np.array([1, 7, 13]))
    assert (codes[:, 3] >= 19).all() and (codes[:, 3] < 35).all()


def test_sequences_get_shorter_as_the_vocabulary_grows(world):
    events = world.interactions.training()
    items, histories = [], []
    for size in (35, 60, 120, 240):
        tokenizer = make(vocabulary_size=size).fit(world.catalog, events)
        features = tokenizer.features(world.catalog)
        rng = np.random.default_rng(0)
        items.append((tokenizer.encode(world.catalog) != END).sum(1).mean())
        histories.append(
            np.mean([len(tokenizer.segment(features[events.user(u)], rng)) for u in range(40)])
        )
    assert all(a > b for a, b in pairwise(items))
    assert all(a > b for a, b in pairwise(histories))


def test_identifiers_are_unique_and_end_with_end(world, fitted):
    index = ItemIndex.build(fitted, world.catalog, collisions="forbid")
    assert index.shared_vocabulary and index.num_levels == 4
    assert (index.codes == END).any() and (index.codes[:, 0] != END).all()


def test_decoding_gives_the_vectors_of_the_quantizer(world, fitted):
    codes = fitted.encode(world.catalog)
    expected = fitted._quantizer.decode(fitted._quantizer.encode(world.catalog))
    assert np.array_equal(fitted.decode(codes), expected)
    numbered = np.where(codes == END, 150, codes)  # numbers that a collision policy adds
    assert np.array_equal(fitted.decode(numbered), expected)
    with pytest.raises(UserError, match="are no item: expected one code of each of the 3 levels"):
        fitted.decode(np.array([[1, 2, 3, 0]]))
    with pytest.raises(UserError, match="expected 0 <= token < 150"):
        fitted.decode_tokens([150])


def test_equal_items_get_buckets_of_their_own_whatever_the_order():
    vectors = np.repeat(np.eye(6, 8, dtype=np.float32), 5, axis=0)
    catalog = Catalog.from_vectors(vectors)
    tokenizer = make(num_buckets=5, vocabulary_size=40).fit(catalog, visits(30))
    codes = tokenizer.encode(catalog)
    assert len(np.unique(codes, axis=0)) == 30
    order = np.random.default_rng(0).permutation(30)
    again = make(num_buckets=5, vocabulary_size=40).fit(catalog.select(order), visits(30))
    buckets = tokenizer.features(catalog)[:, -1] - tokenizer.features(catalog)[:, -1].min()
    others = again.features(catalog)[:, -1] - again.features(catalog)[:, -1].min()
    assert np.array_equal(buckets, others)


def test_more_equal_items_than_buckets_are_left_to_the_policy(caplog):
    catalog = Catalog.from_vectors(np.repeat(np.eye(6, 8, dtype=np.float32), 5, axis=0))
    with caplog.at_level("WARNING", logger="genrec"):
        tokenizer = make(num_buckets=2, vocabulary_size=40).fit(catalog, visits(30))
    assert "18 item(s)" in caplog.text and "num_buckets" in caplog.text
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert len(np.unique(index.codes, axis=0)) == 30


def test_attributes_are_features_and_unknown_values_are_left_out(world):
    tokenizer = make(attributes=["category"], max_values=2, vocabulary_size=140)
    tokenizer.fit(world.catalog, world.interactions.training())
    features = tokenizer.features(world.catalog)
    assert features.shape[1] == 3 + 2 + 1 and (features > 0).all()
    strange = Catalog(
        pl.DataFrame({"item_id": ["new"], "category": [["nowhere"]]}), world.catalog.vectors[:1]
    )
    assert (tokenizer.features(strange)[0, 3:5] == 0).all()
    codes = tokenizer.encode(strange)[0]
    assert codes[0] != END
    assert sorted(sum(tokenizer.decode_tokens(codes.tolist()), ())) == sorted(
        tokenizer.features(strange)[0][[0, 1, 2, 5]].tolist()
    )


def test_bad_settings_are_named(world):
    with pytest.raises(UserError, match=r"vocabulary_size: got 20, .* features alone are 35"):
        make(vocabulary_size=20).fit(world.catalog, world.interactions.training())
    with pytest.raises(DataError, match=r"no column 'categori'.*Did you mean 'category'"):
        make(attributes=["categori"]).fit(world.catalog, world.interactions.training())
    with pytest.raises(ConfigError, match=r"^tokenizer\.quantizer\.name: got 'rqkmean'"):
        make(quantizer={"name": "rqkmean"})
    with pytest.raises(ConfigError, match=r"^tokenizer\.quantizer\.codebooksize: .*codebook_size"):
        make(quantizer={"name": "rqkmeans", "codebooksize": 3})
    with pytest.raises(UserError, match="no training interactions"):
        make().fit(world.catalog)
    with pytest.raises(UserError, match="leak"):
        make().fit(world.catalog, world.interactions)
    with pytest.raises(ConfigError, match=r"^tokenizer\.quantizer\.name: .* share a vocabulary"):
        make(quantizer={"name": "action_piece"})


def test_a_quantizer_without_a_name_is_the_default_one():
    assert make(quantizer={"codebook_size": 8}).config.quantizer["name"] == "opq"
    assert make(quantizer="rqkmeans").config.quantizer["num_levels"] == 3


def test_a_fit_that_fails_leaves_the_tokenizer_as_it_was(world):
    tokenizer = make().fit(world.catalog, world.interactions.training())
    codes = tokenizer.encode(world.catalog)
    with pytest.raises(UserError):
        tokenizer.fit(world.catalog.select(range(3)), visits(3))
    assert np.array_equal(tokenizer.encode(world.catalog), codes)
