"""Do PQ and OPQ keep the contract, and quantize as their papers say?"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import pytest

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.quantization.subspaces import procrustes, split


class TestPQ(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "pq", "codebook_size": 8}


class TestOPQ(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "opq", "codebook_size": 8}


class TestWhitenedOPQWithManyDigits(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "opq",
        "codebook_size": 4,
        "num_levels": 16,
        "pca_dim": 16,
        "whiten": True,
        "split": "contiguous",
        "fit_items": 60,
    }


def make(name: str, **settings: Any) -> ItemTokenizer:
    cls, config = parse_component(TOKENIZERS, {"name": name, **settings}, path="tokenizer")
    return cls(config)


def tree(num_items: int = 300, **changes: Any) -> Catalog:
    return planted(
        num_items, num_users=1, seed=0, **{"branching": 5, "width": 24, **changes}
    ).catalog


def correlated(num_items: int = 300, width: int = 12, seed: int = 0) -> Catalog:
    """Return vectors whose components fall off in variance and hang together."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.linspace(3, 0.1, width)
    return Catalog.from_vectors(np.tanh(rng.normal(size=(num_items, width))) @ mixing + 5.0)


def points_of(tokenizer: ItemTokenizer, catalog: Catalog) -> np.ndarray:
    state = tokenizer.state()
    return (tokenizer.inputs(catalog) - state["mean"]) @ state["projection"]


def parts_of(tokenizer: ItemTokenizer, catalog: Catalog) -> list[np.ndarray]:
    return np.split(points_of(tokenizer, catalog), len(tokenizer.codebook_sizes), axis=1)


def error_of(tokenizer: ItemTokenizer, catalog: Catalog) -> float:
    decoded = tokenizer.decode(tokenizer.encode(catalog))
    return float(np.square(tokenizer.inputs(catalog) - decoded).sum())


def quantized_error_of(tokenizer: ItemTokenizer, catalog: Catalog) -> float:
    codes, state = tokenizer.encode(catalog), tokenizer.state()
    parts = parts_of(tokenizer, catalog)
    return float(
        sum(np.square(p - state[f"codebook_{i}"][codes[:, i]]).sum() for i, p in enumerate(parts))
    )


# -- codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"whiten": True}, {"split": "contiguous", "pca_dim": 8}])
@pytest.mark.parametrize("name", ["pq", "opq"])
def test_each_code_is_the_nearest_of_its_sub_space_by_brute_force(name, settings):
    catalog = correlated()
    tokenizer = make(name, codebook_size=9, **settings).fit(catalog)
    codes = tokenizer.encode(catalog)
    for level, part in enumerate(parts_of(tokenizer, catalog)):
        book = tokenizer.state()[f"codebook_{level}"].astype("f8")
        distances = np.square(part[:, None].astype("f8") - book).sum(-1)
        chosen = distances[np.arange(len(part)), codes[:, level]]
        assert np.allclose(chosen, distances.min(axis=1), rtol=1e-4, atol=1e-5)
        assert (codes[:, level] == distances.argmin(axis=1)).mean() > 0.99
        assert len(np.unique(codes[:, level])) == 9
    last = tokenizer.last_level_distances(catalog)
    assert np.allclose(last, distances, rtol=1e-3, atol=1e-3)


def test_distances_of_the_last_level_decide_where_colliding_items_go():
    catalog = tree(200, noise=0.1)
    tokenizer = make("pq", codebook_size=32, num_levels=2).fit(catalog)
    before = tokenizer.encode(catalog)
    assert len(np.unique(before, axis=0)) < len(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="assign_last")
    assert index.num_levels == 2 and len(np.unique(index.codes, axis=0)) == len(catalog)
    assert np.array_equal(index.codes[:, 0], before[:, 0])


def test_items_with_equal_vectors_collide_however_many_digits_and_become_unique():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(90, 64)), 2, axis=0)
    catalog = Catalog.from_vectors(vectors)
    tokenizer = make("pq", codebook_size=16, num_levels=64).fit(catalog)
    codes = tokenizer.encode(catalog)
    assert codes.shape == (180, 64) and np.array_equal(codes[::2], codes[1::2])
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert index.codebook_sizes == (*(16,) * 64, 2)


def test_codes_do_not_depend_on_the_order_of_the_catalogue():
    catalog = correlated()
    rows = np.random.default_rng(1).permutation(len(catalog))
    for name, settings in (("pq", {}), ("opq", {"num_rounds": 3, "fit_items": 200})):
        one = make(name, codebook_size=8, **settings).fit(catalog)
        other = make(name, codebook_size=8, **settings).fit(catalog.select(rows))
        assert np.array_equal(one.encode(catalog), other.encode(catalog))


def test_new_items_get_the_codes_of_the_vectors_that_they_repeat():
    catalog = correlated()
    tokenizer = make("opq", codebook_size=8).fit(catalog)
    new = Catalog.from_vectors(catalog.vectors[:5], [f"new {i}" for i in range(5)])
    assert np.array_equal(tokenizer.encode(new), tokenizer.encode(catalog)[:5])


# -- error ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("how", ["balanced", "contiguous"])
@pytest.mark.parametrize("seed", [0, 1])
def test_opq_never_quantizes_worse_than_the_pq_it_starts_from(whiten, how, seed):
    catalog = correlated(seed=seed)
    settings = {"codebook_size": 8, "whiten": whiten, "split": how, "num_levels": 3}
    pq, opq = (make(name, **settings).fit(catalog) for name in ("pq", "opq"))
    assert quantized_error_of(opq, catalog) < quantized_error_of(pq, catalog)
    if not whiten:  # then both spaces have the same lengths
        assert error_of(opq, catalog) < error_of(pq, catalog)


def test_the_error_of_opq_never_rises_with_the_rounds():
    catalog = correlated()
    errors = [
        quantized_error_of(make("opq", codebook_size=8, num_rounds=n).fit(catalog), catalog)
        for n in (0, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["pq", "opq"])
def test_the_rotation_is_orthogonal_and_undone_by_decoding(name):
    catalog = correlated()
    state = make(name, codebook_size=8, num_levels=3).fit(catalog).state()
    assert np.allclose(state["projection"].T @ state["projection"], np.eye(12), atol=1e-5)
    assert np.allclose(state["reconstruction"], state["projection"].T, atol=1e-6)
    whitened = make(name, codebook_size=8, num_levels=3, whiten=True).fit(catalog)
    state = whitened.state()
    assert np.allclose(state["projection"] @ state["reconstruction"], np.eye(12), atol=1e-3)
    assert np.allclose(np.cov(points_of(whitened, catalog).T, bias=True), np.eye(12), atol=1e-3)


def test_as_many_codes_as_items_reconstruct_what_the_components_keep():
    catalog = correlated(40)
    for whiten in (False, True):
        tokenizer = make("pq", codebook_size=40, num_levels=3, whiten=whiten).fit(catalog)
        decoded = tokenizer.decode(tokenizer.encode(catalog))
        assert np.allclose(decoded, catalog.vectors, atol=1e-3)


def test_pq_beats_random_codebooks():
    catalog = tree()
    tokenizer = make("pq", codebook_size=8).fit(catalog)
    rng = np.random.default_rng(0)
    state = {
        name: rng.normal(a.mean(0), a.std(0), a.shape).astype("f4") if "codebook" in name else a
        for name, a in tokenizer.state().items()
    }
    random = make("pq", codebook_size=8).load_state(state)
    assert error_of(tokenizer, catalog) < 0.7 * error_of(random, catalog)


def test_opq_finds_the_rotation_in_which_planted_codes_are_independent():
    """Vectors that are a product of codebooks, hidden by a rotation, are coded much better."""
    rng = np.random.default_rng(0)
    books = rng.normal(size=(3, 4, 4)) * 4
    codes = rng.integers(0, 4, (600, 3))
    hidden = np.hstack([books[i, codes[:, i]] for i in range(3)])
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    catalog = Catalog.from_vectors(hidden @ rotation + 0.01 * rng.normal(size=hidden.shape))
    settings = {"codebook_size": 4, "num_levels": 3}
    pq, opq = (make(n, **settings).fit(catalog) for n in ("pq", "opq"))
    assert error_of(opq, catalog) < 0.75 * error_of(pq, catalog)


def test_the_first_codes_explain_most():
    catalog = correlated(400)
    for settings in ({}, {"split": "contiguous"}, {"whiten": True}):
        tokenizer = make("pq", codebook_size=8, num_levels=4, **settings).fit(catalog)
        codes, state = tokenizer.encode(catalog), tokenizer.state()
        centred = tokenizer.inputs(catalog) - state["mean"]
        maps = np.split(state["reconstruction"], 4)
        gains = [
            np.square(centred).sum()
            - np.square(centred - state[f"codebook_{i}"][codes[:, i]] @ maps[i]).sum()
            for i in range(4)
        ]
        assert gains == sorted(gains, reverse=True) and gains[-1] > 0


def test_procrustes_recovers_a_rotation():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 6)).astype("f4")
    truth, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    found = procrustes(points, (points @ truth).astype("f4"))
    assert np.allclose(found, truth, atol=1e-5)
    assert np.allclose(found.T @ found, np.eye(6), atol=1e-6)


def test_a_balanced_split_evens_out_the_products_of_variances():
    variances = np.array([64.0, 32, 16, 8, 4, 2, 1, 0.5])
    found = split(variances, 2, "balanced")
    products = np.prod((variances @ found).reshape(2, 4), axis=1)
    assert products.max() / products.min() <= 2
    assert np.array_equal(found @ found.T, np.eye(8))
    assert np.array_equal(split(variances, 2, "contiguous"), np.eye(8))
    assert split(np.zeros(4), 2, "balanced").sum() == 4


# -- bad input --------------------------------------------------------------------------------


def test_a_width_without_equal_parts_is_cut_to_one_with_them():
    catalog = correlated(width=14)
    tokenizer = make("pq", codebook_size=8, num_levels=4).fit(catalog)
    assert tokenizer.state()["projection"].shape == (14, 12)
    assert tokenizer.decode(tokenizer.encode(catalog)).shape == (300, 14)


def test_widths_that_cannot_be_are_errors_that_say_what_can():
    catalog = correlated(width=6)
    with pytest.raises(UserError, match=r"num_levels: got 8.*width 6.*num_levels=6"):
        make("pq", codebook_size=8, num_levels=8).fit(catalog)
    with pytest.raises(UserError, match=r"pca_dim: got 8.*width 6.*pca_dim=4"):
        make("pq", codebook_size=8, pca_dim=8).fit(catalog)
    with pytest.raises(ConfigError, match=r"tokenizer\.pca_dim: got 10.*num_levels=4, e\.g\. 12"):
        make("opq", pca_dim=10)
    with pytest.raises(ConfigError, match=r"tokenizer\.num_rounds: unknown key"):
        make("pq", num_rounds=3)


@pytest.mark.parametrize("name", ["pq", "opq"])
def test_fewer_items_than_codes_and_constant_vectors_are_errors(name):
    with pytest.raises(UserError, match=r"got 300.*only 250.*codebook_size=250"):
        make(name, codebook_size=300).fit(correlated(250))
    with pytest.raises(UserError, match="only 1 different"):
        make(name, codebook_size=2).fit(Catalog.from_vectors(np.ones((9, 8))))


@pytest.mark.parametrize("name", ["pq", "opq"])
def test_nan_vectors_are_an_error_that_names_the_items(name):
    vectors = np.random.default_rng(0).normal(size=(20, 8))
    vectors[7, 1] = np.nan
    ids = ["seven" if row == 7 else f"i{row}" for row in range(20)]
    with pytest.raises(DataError, match=r"1 item\(s\).*'seven'.*embed"):
        make(name, codebook_size=2).fit(Catalog.from_vectors(vectors, ids))
    tokenizer = make(name, codebook_size=2).fit(correlated(width=8))
    with pytest.raises(UserError, match=r"\(300, 12\), expected \(items, 8\)"):
        tokenizer.encode(correlated())


@pytest.mark.parametrize("whiten", [False, True])
def test_levels_of_one_code_stand_for_the_mean(whiten):
    vectors = np.ones((9, 8), np.float32)  # with one code even constant vectors will do
    for catalog in (correlated(40), Catalog.from_vectors(vectors)):
        tokenizer = make("opq", codebook_size=1, whiten=whiten).fit(catalog)
        assert tokenizer.codebook_sizes == (1, 1, 1, 1)
        assert not tokenizer.encode(catalog).any()
        decoded = tokenizer.decode(tokenizer.encode(catalog))
        assert np.allclose(decoded, catalog.vectors.mean(0), atol=1e-3)


def test_a_level_shrinks_where_sub_vectors_repeat(caplog):
    rng = np.random.default_rng(0)
    vectors = np.zeros((60, 4), np.float32)
    vectors[:, 0] = rng.normal(size=60) * 10
    vectors[:, 1] = rng.integers(0, 3, 60)
    logging.getLogger("genrec").propagate = True
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = make("pq", codebook_size=8, split="contiguous").fit(
            Catalog.from_vectors(vectors)
        )
    assert tokenizer.codebook_sizes[0] == 8 and tokenizer.codebook_sizes[-1] == 1
    assert "of 2 of 4 levels take fewer than 8 different values (one 1)" in caplog.text
    catalog = Catalog.from_vectors(vectors)
    loaded = make("pq", codebook_size=8, split="contiguous").load_state(tokenizer.state())
    assert np.array_equal(loaded.encode(catalog), tokenizer.encode(catalog))
