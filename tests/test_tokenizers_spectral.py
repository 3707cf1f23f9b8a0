"""Do collaborative codes follow the co-occurrence graph, inside their sizes, and nothing else?"""

from __future__ import annotations

import logging
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from genrec.config import parse_component
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.interactions import TRAIN
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError, UserError
from genrec.features.collaborative import cooccurrence
from genrec.inference import search
from genrec.item_index import ItemIndex
from genrec.models.decoder_only import DecoderOnly
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS, spectral
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.spectral import cluster_qr, split_graph
from genrec.trainers.base import Trainer
from genrec.trainers.batching import TrainingExamples


class TestCollaborative(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "collaborative",
        "num_clusters": 4,
        "leaf_size": 10,
    }


class TestCollaborativeWithUniqueNodes(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {**TestCollaborative.config, "node_codes": "unique"}


def make(**config: Any) -> ItemTokenizer:
    cls, checked = parse_component(
        TOKENIZERS, {"name": "collaborative", **config}, path="tokenizer"
    )
    return cls(checked)


def sequences(walks: list[list[int]], num_items: int) -> Interactions:
    offsets = np.concatenate([[0], np.cumsum([len(walk) for walk in walks])]).astype(np.int64)
    rows = np.array([row for walk in walks for row in walk], np.int32)
    zeros = np.zeros(len(rows), np.int64)
    return Interactions(rows, offsets, zeros, np.full(len(rows), TRAIN, np.uint8), num_items)


def bare(num_items: int) -> Catalog:
    return Catalog.from_vectors(np.zeros((num_items, 1)), [f"i{n:04d}" for n in range(num_items)])


def groups(num_groups: int, size: int, *, users: int, seed: int = 0) -> Interactions:
    """Users who stay in one group of items, all groups connected by a few wanderers."""
    rng = np.random.default_rng(seed)
    walks = [
        (rng.integers(0, size, 6) + size * (user % num_groups)).tolist() for user in range(users)
    ]
    walks += [rng.integers(0, size * num_groups, 3).tolist() for _ in range(users // 10)]
    return sequences(walks, size * num_groups)


def leaf_sizes(tokenizer: ItemTokenizer, catalog: Catalog) -> np.ndarray:
    return np.unique(tokenizer.encode(catalog), axis=0, return_counts=True)[1]


# -- the graph --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=9), min_size=1, max_size=7))
def test_the_affinity_is_symmetric_and_equal_to_a_brute_force_count(walks):
    """Each user counts once for each unordered pair, whatever the order and the repetitions."""
    expected = np.zeros((8, 8))
    for walk in walks:
        for a, b in combinations(sorted(set(walk)), 2):
            expected[a, b] += 1
            expected[b, a] += 1
    found = cooccurrence(sequences(walks, 8)).toarray()
    assert np.array_equal(found, expected) and np.array_equal(found, found.T)


def random_graph(num_items: int, seed: int = 0) -> sp.csr_array:
    return cooccurrence(groups(5, num_items // 5, users=num_items * 4, seed=seed))


def test_a_node_is_split_as_scikit_learn_splits_it():
    graph = random_graph(60)
    reference = SpectralClustering(
        5, affinity="precomputed", assign_labels="cluster_qr", random_state=0
    ).fit_predict(graph.toarray())
    assert adjusted_rand_score(reference, split_graph(graph, 5, 1e-9)) == 1.0


def test_lanczos_with_the_implicit_uniform_part_equals_the_dense_solution(monkeypatch):
    graph = random_graph(200, seed=3)
    dense = split_graph(graph, 5, 0.3)
    monkeypatch.setattr(spectral, "DENSE_BELOW", 10)
    assert np.array_equal(split_graph(graph, 5, 0.3), dense)


def test_cluster_qr_finds_indicator_vectors_whatever_their_basis():
    labels = np.array([0, 0, 1, 2, 2, 2, 1, 0])
    vectors = np.eye(3)[labels] @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert adjusted_rand_score(labels, cluster_qr(vectors)) == 1.0


def test_a_solver_that_does_not_converge_is_said_and_survived(monkeypatch, caplog):
    logging.getLogger("genrec").propagate = True

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise spectral.ArpackNoConvergence("no", np.empty(0), np.empty((200, 0)))

    monkeypatch.setattr(spectral, "DENSE_BELOW", 10)
    monkeypatch.setattr(spectral, "eigsh", failing)
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = make(num_clusters=4, leaf_size=60).fit(bare(200), groups(5, 40, users=300))
    assert "only 0 of 4 eigenvectors" in caplog.text
    assert leaf_sizes(tokenizer, bare(200)).max() <= 60


# -- the tree ---------------------------------------------------------------------------------


def test_groups_of_users_are_the_clusters():
    events, catalog = groups(6, 20, users=400), bare(120)
    codes = make(num_clusters=6, leaf_size=40).fit(catalog, events).encode(catalog)
    assert codes.shape == (120, 1)
    assert normalized_mutual_info_score(np.arange(120) // 20, codes[:, 0]) > 0.95


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(2, 6),
    st.integers(1, 15),
    st.sampled_from(["shared", "unique"]),
    st.integers(0, 5),
)
def test_every_leaf_is_small_and_every_path_is_a_leaf(size, clusters, leaf, node_codes, seed):
    rng = np.random.default_rng(seed)
    walks = [rng.integers(0, max(1, size - seed), 5).tolist() for _ in range(30)]
    walks.append([0, max(0, size - 1)])
    events, catalog = sequences(walks, size), bare(size)
    if not cooccurrence(events).nnz:
        return
    settings_ = {
        "num_clusters": clusters,
        "leaf_size": leaf,
        "node_codes": node_codes,
        "max_levels": 7,
    }
    tokenizer = make(**settings_).fit(catalog, events)
    codes, sizes = tokenizer.encode(catalog), tokenizer.codebook_sizes
    assert leaf_sizes(tokenizer, catalog).max() <= leaf
    assert len(sizes) <= 7 and (codes.max(axis=0) + 1 == sizes).all()
    if node_codes == "shared":
        assert max(sizes) <= clusters + 1
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert index.codebook_sizes[-1] <= leaf


def test_shared_and_unique_node_codes_describe_the_same_tree():
    events, catalog = groups(6, 20, users=400), bare(120)
    shared, unique = (
        make(num_clusters=3, leaf_size=12, node_codes=n).fit(catalog, events).encode(catalog)
        for n in ("shared", "unique")
    )
    for level in range(1, shared.shape[1] + 1):
        one, other = (np.unique(c[:, :level], axis=0, return_inverse=True)[1].ravel()
                      for c in (shared, unique))  # fmt: skip
        assert adjusted_rand_score(one, other) == 1.0
    # A code of a level says which node it is, but for the end of a path.
    last = unique[:, -1]
    inside = last > 0
    paths = np.unique(unique[inside], axis=0)
    assert len(paths) == len(np.unique(last[inside]))


def test_items_without_interactions_stay_together_and_small(caplog):
    logging.getLogger("genrec").propagate = True
    events, catalog = groups(3, 20, users=200), bare(100)  # items 60..99 never occur
    events = Interactions(events.item_rows, events.offsets, events.timestamps, events.splits, 100)
    with caplog.at_level(logging.INFO, logger="genrec"):
        tokenizer = make(num_clusters=4, leaf_size=16).fit(catalog, events)
    assert "40 of 100 items occur with no other item" in caplog.text
    codes = tokenizer.encode(catalog)
    assert len(np.unique(codes[60:, 0])) == 1  # one cluster, then cut evenly by id
    assert leaf_sizes(tokenizer, catalog).max() <= 16


def test_a_graph_that_cannot_be_split_is_cut_evenly():
    clique = sequences([list(range(50))] * 3, 50)  # all items alike
    tokenizer = make(num_clusters=4, leaf_size=5, max_levels=3).fit(bare(50), clique)
    assert leaf_sizes(tokenizer, bare(50)).max() <= 5


def test_a_star_does_not_make_long_paths():
    star = sequences([[0, n] for n in range(1, 200)], 200)  # clusters peel off one by one
    tokenizer = make(num_clusters=3, leaf_size=10, max_levels=4).fit(bare(200), star)
    assert len(tokenizer.codebook_sizes) <= 4
    assert leaf_sizes(tokenizer, bare(200)).max() <= 10


def test_codes_do_not_depend_on_the_order_of_catalogue_rows_or_users():
    data = planted(150, 200, seed=2, branching=3)
    events = data.interactions.training()
    order = np.random.default_rng(4).permutation(150)
    place = np.argsort(order)
    walks = [place[events.user(user)].tolist() for user in range(events.num_users)]
    shuffled = sequences(walks[::-1], 150)
    one = make(num_clusters=5, leaf_size=12).fit(data.catalog, events)
    other = make(num_clusters=5, leaf_size=12).fit(data.catalog.select(order), shuffled)
    assert np.array_equal(one.encode(data.catalog), other.encode(data.catalog))


# -- what the codes are worth -----------------------------------------------------------------


def shared_prefix_agreement(index: ItemIndex, events: Interactions) -> float:
    """Return the share of co-occurrence between items with the same first code, over chance."""
    first = index.codes[:, 0]
    counts = cooccurrence(events).tocoo()
    together = counts.data[first[counts.row] == first[counts.col]].sum() / counts.data.sum()
    chance = np.square(np.bincount(first) / len(first)).sum()
    return float(together / chance)


def test_collaborative_and_category_codes_agree_with_held_out_steps_more_than_random_ones():
    data = planted(200, 400, seed=1, branching=4)
    training = data.interactions.training()
    found = {}
    for section in (
        {"name": "collaborative", "num_clusters": 4, "leaf_size": 20},
        {"name": "semantic_category"},
        {"name": "random", "base": 4},
    ):
        cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
        tokenizer = cls(config).fit(data.catalog, training)
        index = ItemIndex.build(tokenizer, data.catalog, collisions="extra_level")
        steps = data.interactions.examples("test")
        last = [int(history[-1]) for history in steps.histories()]
        pairs = sequences([[a, int(b)] for a, b in zip(last, steps.target_rows, strict=True)], 200)
        found[section["name"]] = shared_prefix_agreement(index, pairs)
    assert found["random"] == pytest.approx(1.0, abs=0.3)
    assert found["collaborative"] > 2 and found["semantic_category"] > 2


def recall_of_a_tiny_generator(section: dict[str, Any], data: Dataset, folder: Path) -> float:
    """Return recall@10 of the test items after three epochs of a one-layer transformer."""
    training = data.interactions.training()
    cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
    tokenizer = cls(config).fit(data.catalog, training)
    index = ItemIndex.build(tokenizer, data.catalog, collisions="extra_level")
    torch.manual_seed(0)
    small = DecoderOnly.Config(max_history=4, d_model=32, num_layers=1, num_heads=2, d_ff=64)
    model = DecoderOnly.from_index(small, index)
    Trainer(Trainer.Config(epochs=3, batch_size=16, learning_rate=5e-3), seed=0).fit(
        model,
        TrainingExamples(training, model.training_unit, 4),
        None,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        key="key",
    )
    examples = data.interactions.examples("test")
    lists = search(model, CSRIndex.from_index(index), examples.histories(), width=10, k=10)
    return float((lists.rows == examples.target_rows[:, None]).any(axis=1).mean())


def test_a_generator_of_clusters_or_categories_beats_one_of_random_numbers(tmp_path):
    data = planted(200, 300, seed=1, branching=4)
    clusters = {"name": "collaborative", "num_clusters": 16, "leaf_size": 30}
    sections = [{"name": "random", "base": 16}, clusters, {"name": "semantic_category"}]
    random, collaborative, category = (
        recall_of_a_tiny_generator(section, data, tmp_path / section["name"])
        for section in sections
    )
    assert collaborative > 1.5 * random and category > 1.5 * random


def test_the_clusters_are_the_planted_tree():
    data = planted(200, 600, seed=0, branching=3)
    codes = (
        make(num_clusters=9, leaf_size=100)
        .fit(data.catalog, data.interactions.training())
        .encode(data.catalog)
    )
    middle = np.unique([c[-2] for c in data.catalog.table["category"]], return_inverse=True)[1]
    assert normalized_mutual_info_score(middle, codes[:, 0]) > 0.8


# -- bad input and the whole way --------------------------------------------------------------


def test_what_cannot_be_clustered_is_an_error_that_says_so():
    with pytest.raises(UserError, match="collaborative: got no training interactions"):
        make().fit(bare(4))
    with pytest.raises(UserError, match=r"no two items occur.*two different items"):
        make().fit(bare(4), sequences([[1], [2, 2]], 4))
    with pytest.raises(UserError, match="of 3 items, the catalogue has 4"):
        make().fit(bare(4), sequences([[0, 1]], 3))
    with pytest.raises(UserError, match=r"max_levels: got 2, but 2 levels .* hold 8 items.* 10"):
        make(num_clusters=2, leaf_size=2, max_levels=2).fit(bare(10), sequences([[0, 1]], 10))
    with pytest.raises(ConfigError, match=r"tokenizer\.num_clusters: got 1"):
        make(num_clusters=1)


def test_items_that_were_not_fitted_are_named():
    tokenizer = make(num_clusters=2).fit(bare(4), sequences([[0, 1, 2]], 4))
    with pytest.raises(UserError, match=r"collaborative: 1 item\(s\).*'new'.*Fit it again"):
        tokenizer.encode(Catalog.from_vectors(np.ones((1, 1)), ["new"]))


@pytest.mark.parametrize("num_items", [1, 2, 3])
def test_tiny_catalogues_have_codes(num_items):
    events = sequences([list(range(num_items)) * 2], num_items)
    if num_items == 1:
        with pytest.raises(UserError, match="no two items"):
            make().fit(bare(1), events)
        return
    codes = make().fit(bare(num_items), events).encode(bare(num_items))
    assert codes.shape == (num_items, 1) and len(np.unique(codes)) == num_items


def test_from_fit_to_the_tree_of_a_search_and_insertion():
    data = planted(150, 200, seed=2, branching=3)
    catalog = Catalog(data.catalog.table)  # no vectors
    tokenizer = make(num_clusters=5, leaf_size=12).fit(catalog, data.interactions.training())
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert index.codebook_sizes[-1] <= 12
    assert np.array_equal(index.rows_of_codes(index.codes), np.arange(150))
    tree = CSRIndex.from_index(index)
    assert tree.num_nodes[-1] == 150
    half = index.remove(catalog.item_ids[70:])
    assert np.array_equal(half.codes, index.codes[:70])
    grown = half.add(catalog.item_ids[70:], index.codes[70:])
    assert np.array_equal(grown.codes, index.codes)
