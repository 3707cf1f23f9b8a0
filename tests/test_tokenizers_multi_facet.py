"""Does a multi-facet identifier say attributes, title and id, and still name one item?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import END, ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.multi_facet import MultiFacet

SMALL: dict[str, Any] = {"name": "multi_facet", "num_subwords": 300}
BY_VECTOR = {"name": "rqkmeans", "num_levels": 2, "codebook_size": 6}


class TestMultiFacet(TokenizerContract):
    config: ClassVar[dict[str, Any]] = SMALL


class TestMultiFacetByVector(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {**SMALL, "id_codes": BY_VECTOR, "title_tokens": 3}


class TestIdAndTitle(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        **SMALL,
        "facets": ["id", "title"],
        "id_codes": {"name": "random", "base": 10},
    }


def make(**changes: Any) -> MultiFacet:
    cls, config = parse_component(TOKENIZERS, {**SMALL, **changes}, path="tokenizer")
    return cls(config)


FILMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "title": ["The long night", "Night train", "The long night", None],
        "genres": [["Drama", "Crime"], ["Crime"], [], ["Drama", "War", "Crime", "Drama"]],
        "year": [1990, 1991, 1992, 1993],
    }
)
RANDOM = {"name": "random", "base": 10}


@pytest.fixture(scope="module")
def films():
    catalog = Catalog(FILMS)
    return catalog, make(id_codes=RANDOM, title_tokens=2).fit(catalog)


def test_facets_come_in_the_stated_order_behind_their_markers(films):
    catalog, tokenizer = films
    codes, facets = tokenizer.encode(catalog), tokenizer.facets(catalog)
    assert list(facets) == ["attributes", "title", "id"]
    assert [len(codes) for codes in facets["attributes"]] == [3, 2, 1, 4]
    for marker, name in enumerate(facets, start=1):
        assert all(found[0] == marker for found in facets[name])
    for row, found in enumerate(codes):
        spelled = [*facets["attributes"][row], *facets["title"][row][:3], *facets["id"][row]]
        assert found.tolist() == spelled + [END] * (codes.shape[1] - len(spelled))
    flipped = make(facets=["id", "attributes"], id_codes=RANDOM).fit(catalog)
    assert flipped.encode(catalog)[:, 0].tolist() == [1] * 4
    assert "title" not in flipped.facets(catalog)


def test_codes_say_what_they_stand_for(films):
    catalog, tokenizer = films
    facets = tokenizer.facets(catalog)
    assert tokenizer.text_of(facets["title"][0]) == "title: The long night"
    assert tokenizer.text_of(facets["title"][1][1:]) == "Night train"
    assert tokenizer.text_of(facets["attributes"][0]) == "attributes: Crime Drama"
    text = tokenizer.text_of(tokenizer.encode(catalog)[0])
    assert text.startswith("attributes: Crime Drama | title: The") and " | id: " in text
    # No title: the text of all columns stands in.
    assert "genres: Drama" in tokenizer.text_of(facets["title"][3])


def test_codes_of_different_facets_are_different(films):
    catalog, tokenizer = films
    facets = tokenizer.facets(catalog)
    used = [{code for codes in found for code in codes} for found in facets.values()]
    assert sum(map(len, used)) == len(set().union(*used))
    assert max(map(max, used)) < tokenizer.codebook_sizes[0]


def test_the_id_tells_equal_items_apart():
    table = pl.DataFrame({"item_id": ["x", "y", "z"], "title": ["Same"] * 3})
    catalog = Catalog(table)
    tokenizer = make(id_codes=RANDOM).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="forbid")
    assert len(np.unique(index.codes, axis=0)) == 3


def test_new_items_are_coded_where_the_id_can_be():
    data = planted(60, num_users=10, seed=0, branching=3)
    seen, new = data.catalog.select(range(50)), data.catalog.select(range(50, 60))
    by_vector = make(id_codes=BY_VECTOR).fit(seen)
    assert by_vector.codes_new_items and by_vector.needs == {"texts", "vectors"}
    strange = Catalog(
        new.table.with_columns(
            category=pl.Series([["nowhere"]] * 10), title=pl.lit("Ünheard of: a title")
        ),
        new.vectors,
    )
    facets = by_vector.facets(strange)
    assert facets["attributes"] == [(1,)] * 10
    assert by_vector.text_of(facets["title"][0]) == "title: Ünheard of: a title"
    by_number = make(id_codes=RANDOM).fit(seen)
    assert not by_number.codes_new_items and by_number.needs == {"texts"}
    with pytest.raises(UserError, match="'i50'"):
        by_number.encode(new)


def test_attribute_columns_can_be_named():
    tokenizer = make(id_codes=RANDOM, attributes=["year", "genres"], max_values=1)
    tokenizer.fit(Catalog(FILMS))
    found = tokenizer.facets(Catalog(FILMS))["attributes"]
    assert [tokenizer.text_of(codes) for codes in found] == [
        "attributes: 1990 Drama",
        "attributes: 1991 Crime",
        "attributes: 1992",
        "attributes: 1993 Drama",
    ]


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"tokenizer\.facets.*'id' among them"):
        make(facets=["title"])
    with pytest.raises(ConfigError, match=r"tokenizer\.facets.*at most once"):
        make(facets=["id", "id"])
    with pytest.raises(ConfigError, match=r"^tokenizer\.id_codes\.name: .*mean 'sequential'"):
        make(id_codes={"name": "sequentiel"})
    with pytest.raises(ConfigError, match=r"^tokenizer\.id_codes\.name: .* share a vocabulary"):
        make(id_codes={"name": "title"})
    with pytest.raises(DataError, match=r"no column 'genre'.*Did you mean 'genres'"):
        make(id_codes=RANDOM, attributes=["genre"]).fit(Catalog(FILMS))
    with pytest.raises(DataError, match="'d'"):
        make(id_codes=RANDOM, missing="error").fit(Catalog(FILMS))
    with pytest.raises(UserError, match="without items"):
        make(id_codes=RANDOM).fit(Catalog(FILMS[:0]))
