"""Are a hybrid's codes its parts' codes, in the order that it states?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError, UserError
from genrec.features.collaborative import CollaborativeConfig, collaborative_vectors
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

CID = {"name": "collaborative", "num_clusters": 4, "leaf_size": 10}
CONTENT = {"name": "rqkmeans", "num_levels": 2, "codebook_size": 6}


class TestHybrid(TokenizerContract):
    """CID + IID."""

    config: ClassVar[dict[str, Any]] = {
        "name": "hybrid",
        "parts": [{"tokenizer": CID}, {"tokenizer": "independent"}],
    }


class TestHybridOfCategories(TokenizerContract):
    """SemID + IID."""

    config: ClassVar[dict[str, Any]] = {
        "name": "hybrid",
        "parts": ["semantic_category", "independent"],
    }


class TestHybridOfContentAndCollaborativeCodes(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "hybrid",
        "parts": [{"tokenizer": CONTENT}, {"tokenizer": CONTENT, "vectors": "collaborative"}],
        "collaborative": {"width": 8},
        "order": "interleave",
    }


class TestHybridThatCodesNewItems(TokenizerContract):
    """Content codes under the category's path."""

    config: ClassVar[dict[str, Any]] = {
        "name": "hybrid",
        "parts": ["semantic_category", {"tokenizer": CONTENT}],
        "order": "interleave",
    }


def make(*parts: Any, **config: Any) -> Any:
    section = {"name": "hybrid", **({"parts": list(parts)} if parts else {}), **config}
    cls, checked = parse_component(TOKENIZERS, section, path="tokenizer")
    return cls(checked)


def single(section: dict[str, Any]) -> ItemTokenizer:
    cls, checked = parse_component(TOKENIZERS, section, path="tokenizer")
    tokenizer: ItemTokenizer = cls(checked)
    return tokenizer


DATA = planted(80, 60, seed=1, branching=2)
TRAINING = DATA.interactions.training()
CATALOG = DATA.catalog


# -- codes ------------------------------------------------------------------------------------


def test_codes_are_those_of_the_parts_one_after_the_other_or_interleaved():
    one = single(CID).fit(CATALOG, TRAINING)
    two = single(CONTENT).fit(CATALOG, TRAINING)
    a, b = one.encode(CATALOG), two.encode(CATALOG)
    parts = [{"tokenizer": CID}, {"tokenizer": CONTENT}]
    behind = make(*parts).fit(CATALOG, TRAINING)
    assert np.array_equal(behind.encode(CATALOG), np.concatenate([a, b], axis=1))
    assert behind.codebook_sizes == (*one.codebook_sizes, *two.codebook_sizes)
    mixed = make(*parts, order="interleave").fit(CATALOG, TRAINING)
    assert a.shape[1] == 2 and b.shape[1] == 2
    columns = [a[:, 0], b[:, 0], a[:, 1], b[:, 1]]
    assert np.array_equal(mixed.encode(CATALOG), np.stack(columns, axis=1))
    sizes = [*one.codebook_sizes, *two.codebook_sizes]
    assert mixed.codebook_sizes == tuple(sizes[n] for n in (0, 2, 1, 3))


def test_a_longer_part_goes_on_alone_and_three_parts_are_fine():
    parts = [{"tokenizer": CONTENT}, "independent", {"tokenizer": {"name": "random", "base": 5}}]
    tokenizer = make(*parts, order="interleave").fit(CATALOG, TRAINING)
    assert tokenizer.codebook_sizes == (6, 80, 4, 6, 5, 5)
    codes = tokenizer.encode(CATALOG)
    random = single({"name": "random", "base": 5}).fit(CATALOG).encode(CATALOG)
    assert np.array_equal(codes[:, [2, 4, 5]], random)
    assert np.array_equal(np.sort(codes[:, 1]), np.arange(80))


def test_a_part_quantises_collaborative_vectors_of_training():
    tokenizer = make(
        {"tokenizer": CONTENT},
        {"tokenizer": {**CONTENT, "codebook_size": 20}, "vectors": "collaborative"},
        collaborative={"width": 8},
    ).fit(CATALOG, TRAINING)
    vectors = collaborative_vectors(TRAINING, CollaborativeConfig(width=8))
    expected = single({**CONTENT, "codebook_size": 20}).fit(CATALOG.with_vectors(vectors))
    codes = tokenizer.encode(CATALOG)
    assert np.array_equal(codes[:, 2:], expected.encode(CATALOG.with_vectors(vectors)))
    assert np.array_equal(codes[:, :2], single(CONTENT).fit(CATALOG).encode(CATALOG))
    distances = tokenizer.last_level_distances(CATALOG)
    assert np.allclose(
        distances, expected.last_level_distances(CATALOG.with_vectors(vectors)), atol=1e-6
    )
    index = ItemIndex.build(tokenizer, CATALOG, collisions="assign_last")
    assert index.num_levels == 4


def test_decode_rebuilds_what_the_content_parts_quantise():
    parts = ["independent", {"tokenizer": CONTENT}, {"tokenizer": {**CONTENT, "num_levels": 3}}]
    tokenizer = make(*parts, order="interleave").fit(CATALOG, TRAINING)
    decoded = tokenizer.decode(tokenizer.encode(CATALOG))
    two, three = (
        single({**CONTENT, "num_levels": levels}).fit(CATALOG, TRAINING) for levels in (2, 3)
    )
    expected = [t.decode(t.encode(CATALOG)) for t in (two, three)]
    assert np.allclose(decoded, np.concatenate(expected, axis=1))
    assert tokenizer.inputs(CATALOG).shape == decoded.shape
    blind = make({"tokenizer": CONTENT, "vectors": "collaborative"}, "independent")
    assert not blind.decodes and "vectors" not in blind.needs
    with pytest.raises(UserError, match="do not stand for vectors"):
        blind.fit(Catalog(CATALOG.table), TRAINING).decode(np.zeros((1, 3), np.int32))


def test_seeds_of_the_parts_move_with_the_seed():
    parts = ["random", "sequential"]
    one, same, other = (make(*parts, seed=s).fit(CATALOG, TRAINING) for s in (0, 0, 3))
    assert np.array_equal(one.encode(CATALOG), same.encode(CATALOG))
    expected = single({"name": "random", "seed": 3}).fit(CATALOG).encode(CATALOG)
    assert np.array_equal(other.encode(CATALOG)[:, : expected.shape[1]], expected)


# -- what it needs and offers -----------------------------------------------------------------


def test_needs_and_new_items_follow_from_the_parts():
    swapped = {"tokenizer": "rqkmeans", "vectors": "collaborative"}
    cases = [
        ([CID, "independent"], {"interactions"}, False),
        (["semantic_category", "rqkmeans"], {"vectors", "texts"}, True),
        (["rqkmeans", swapped], {"vectors", "interactions"}, False),
        ([swapped, "independent"], {"interactions"}, False),
    ]
    for parts, needs, new_items in cases:
        sections = [{"tokenizer": p} if isinstance(p, dict) and "name" in p else p for p in parts]
        tokenizer = make(*sections)
        assert tokenizer.needs == needs
        assert tokenizer.codes_new_items is new_items


def test_the_default_is_a_collaborative_path_and_a_code_of_its_own(tmp_path):
    tokenizer = make().fit(Catalog(CATALOG.table), TRAINING)
    assert [part.name for part in tokenizer.parts] == ["collaborative", "independent"]
    tokenizer.save(tmp_path / "t")
    loaded = ItemTokenizer.load(tmp_path / "t")
    assert loaded.config == tokenizer.config
    assert np.array_equal(loaded.encode(CATALOG), tokenizer.encode(CATALOG))


def test_settings_of_the_parts_are_filled_in_where_a_run_is_recorded():
    section = make("rqkmeans", {"tokenizer": CID}).config.to_dict()
    assert section["parts"][0]["tokenizer"]["num_iterations"] == 25
    assert section["parts"][1]["tokenizer"]["max_levels"] == 6
    assert section["parts"][1]["vectors"] == "content"


def test_a_hybrid_may_be_a_part():
    inner = {"name": "hybrid", "parts": ["random", "independent"]}
    tokenizer = make({"tokenizer": inner}, "sequential").fit(CATALOG, TRAINING)
    assert tokenizer.encode(CATALOG).shape == (80, 2 + 1 + 2)
    assert tokenizer.needs == {"interactions"}


@pytest.mark.parametrize(
    "contract",
    [TestHybrid, TestHybridOfCategories, TestHybridOfContentAndCollaborativeCodes],
)
def test_from_fit_to_the_tree_of_a_search(contract):
    tokenizer = single(contract.config).fit(CATALOG, TRAINING)
    index = ItemIndex.build(tokenizer, CATALOG, collisions="extra_level")
    assert np.array_equal(index.rows_of_codes(index.codes), np.arange(80))
    tree = CSRIndex.from_index(index)
    assert tree.num_nodes[-1] == 80
    if "independent" in str(contract.config):
        assert index.codebook_sizes[-1] == 1  # already unique
        ItemIndex.build(tokenizer, CATALOG, collisions="forbid")


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["random"], r"^tokenizer\.parts: got 1 part\(s\), expected at least 2"),
        (["random", "rndom"], r"^tokenizer\.parts\.1\.tokenizer\.name: got 'rndom'.*'random'"),
        (
            [{"tokenizer": {"name": "random", "bse": 3}}, "random"],
            r"^tokenizer\.parts\.0\.tokenizer\.bse: unknown key\. Did you mean 'base'",
        ),
        (
            ["random", {"tokenizer": {"name": "random", "base": 1}}],
            r"^tokenizer\.parts\.1\.tokenizer\.base: got 1",
        ),
        (
            ["random", {"tokenizer": "random", "vector": "content"}],
            r"^tokenizer\.parts\.1\.vector: unknown key\. Did you mean 'vectors'.*: tokenizer, vec",
        ),
        ([{"tokenizer": {}}, "random"], r"^tokenizer\.parts\.0\.tokenizer\.name: missing"),
        ([{"vectors": "content"}, "random"], r"^tokenizer\.parts\.0\.tokenizer: missing"),
        ([3, "random"], r"^tokenizer\.parts\.0: got 3"),
        (
            ["random", {"tokenizer": "random", "vectors": "collaborative"}],
            r"^tokenizer\.parts\.1\.vectors: got 'collaborative', but 'random' reads no vectors",
        ),
        (
            ["random", "title"],
            r"^tokenizer\.parts\.1\.tokenizer\.name: got 'title', whose .* one vocabulary .*fixed",
        ),
    ],
)
def test_bad_sections_are_named_with_their_path(parts, message):
    with pytest.raises(ConfigError, match=message):
        make(*parts)


def test_every_problem_of_a_part_has_its_own_line():
    with pytest.raises(ConfigError) as error:
        make({"tokenizer": {"name": "rqkmeans", "num_levels": 0, "codebook_size": 0}}, "random")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("tokenizer.parts.0.tokenizer.") for line in lines)


def test_a_part_that_cannot_be_fitted_is_named():
    parts = ["independent", {"tokenizer": {**CONTENT, "codebook_size": 500}}]
    tokenizer = make(*parts)
    with pytest.raises(UserError, match=r"parts\.1 \(rqkmeans\): tokenizer\.codebook_size: got 50"):
        tokenizer.fit(CATALOG, TRAINING)
    with pytest.raises(UserError, match="Hybrid: not fitted"):
        tokenizer.encode(CATALOG)


def test_new_items_without_collaborative_vectors_are_named():
    parts = [{"tokenizer": CONTENT}, {"tokenizer": CONTENT, "vectors": "collaborative"}]
    tokenizer = make(*parts).fit(CATALOG, TRAINING)
    with pytest.raises(UserError, match=r"hybrid: 1 item\(s\).*'new'"):
        tokenizer.encode(Catalog.from_vectors(np.ones((1, 16)), ["new"]))
    own = make({"tokenizer": CONTENT}, "independent").fit(CATALOG, TRAINING)
    with pytest.raises(UserError, match=r"parts\.1 \(independent\): independent: 1 item"):
        own.encode(Catalog.from_vectors(np.ones((1, 16)), ["new"]))


def test_collaborative_vectors_need_training_interactions():
    tokenizer = make({"tokenizer": CONTENT, "vectors": "collaborative"}, "independent")
    with pytest.raises(UserError, match="hybrid: got no training interactions"):
        tokenizer.fit(CATALOG)
    with pytest.raises(UserError, match=r"leak.*training\(\)"):
        tokenizer.fit(CATALOG, DATA.interactions)
