"""Do category codes spell the items' categories, for items that come later too?"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import normalized_mutual_info_score

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted, planted_leaves
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.category import read_labels


class TestSemanticCategory(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "semantic_category"}


class TestSemanticCategoryOfLabels(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "semantic_category",
        "kind": "labels",
        "label_threshold": 2,
    }


def make(**config: Any) -> Any:
    section = {"name": "semantic_category", **config}
    cls, checked = parse_component(TOKENIZERS, section, path="tokenizer")
    tokenizer: ItemTokenizer = cls(checked)
    return tokenizer


def catalog(values: list[Any], column: str = "categories", dtype: Any = None) -> Catalog:
    ids = [f"i{row}" for row in range(len(values))]
    column_values = pl.Series(column, values, dtype=dtype, strict=False)
    return Catalog(pl.DataFrame({"item_id": ids, column: column_values}))


SHOP = catalog(
    [
        ["Beauty", "Hair", "Shampoo"],
        ["Beauty", "Hair", "Shampoo"],
        ["Beauty", "Hair"],
        ["Beauty", "Nails", "Polish"],
        ["Toys"],
        ["Toys", "Hair", "Dolls"],
    ]
)


def paths(tokenizer: Any, items: Catalog) -> list[list[str]]:
    found = []
    for codes in tokenizer.encode(items).tolist():
        labels = [tokenizer.label_of(level, code) for level, code in enumerate(codes)]
        found.append([label for label in labels if label is not None])
    return found


# -- paths ------------------------------------------------------------------------------------


def test_codes_spell_the_path_and_zero_means_no_label():
    tokenizer = make().fit(SHOP)
    assert paths(tokenizer, SHOP) == SHOP.table["categories"].to_list()
    assert tokenizer.codebook_sizes == (3, 3, 4)
    codes = tokenizer.encode(SHOP)
    assert codes[4].tolist() == [2, 0, 0] and codes[2, 2] == 0
    assert np.array_equal(codes[0], codes[1])


def test_a_leaf_number_makes_the_identifier_unique_within_its_path():
    index = ItemIndex.build(make().fit(SHOP), SHOP, collisions="extra_level")
    assert index.codes[:, -1].tolist() == [0, 1, 0, 0, 0, 0]
    assert index.codebook_sizes == (3, 3, 4, 2)
    with pytest.raises(UserError, match="'i0', 'i1'"):
        ItemIndex.build(make().fit(SHOP), SHOP, collisions="forbid")


def test_new_items_take_the_deepest_category_that_is_known():
    tokenizer = make().fit(SHOP)
    new = catalog(
        [["Beauty", "Hair", "Combs"], ["Beauty", "Books", "Shampoo"], ["Toys", "Nails"], ["Food"]]
    )
    assert paths(tokenizer, new) == [["Beauty", "Hair"], ["Beauty"], ["Toys", "Nails"], []]


def test_a_new_item_goes_into_the_index_and_no_code_changes():
    tokenizer = make().fit(SHOP)
    index = ItemIndex.build(tokenizer, SHOP, collisions="extra_level")
    new = Catalog(pl.DataFrame({"item_id": ["new"], "categories": [["Toys"]]}))
    codes = np.concatenate([tokenizer.encode(new), [[1]]], axis=1)
    grown = index.add(["new"], codes)
    assert np.array_equal(grown.codes[:6], index.codes) and grown.codes[6].tolist() == [2, 0, 0, 1]


def test_paths_are_cut_at_the_configured_depth():
    tokenizer = make(max_levels=2).fit(SHOP)
    assert paths(tokenizer, SHOP)[0] == ["Beauty", "Hair"]
    assert len(tokenizer.codebook_sizes) == 2


def test_codes_do_not_depend_on_the_order_of_rows():
    order = [3, 0, 5, 1, 4, 2]
    assert np.array_equal(
        make().fit(SHOP.select(order)).encode(SHOP), make().fit(SHOP).encode(SHOP)
    )


# -- labels without an order ------------------------------------------------------------------

MOVIES = catalog(
    [
        ["Comedy", "Drama"],
        ["Drama"],
        ["Western", "Drama", "Action"],
        ["Action", "Comedy", "Drama"],
        ["Comedy"],
        ["Noir"],
    ],
    "genres",
)


def test_labels_are_sorted_by_frequency_then_name_and_rare_ones_left_out():
    tokenizer = make(label_threshold=1).fit(MOVIES)  # Drama 4, Comedy 3, Action 2
    assert paths(tokenizer, MOVIES) == [
        ["Drama", "Comedy"],
        ["Drama"],
        ["Drama", "Action"],
        ["Drama", "Comedy", "Action"],
        ["Comedy"],
        [],
    ]
    assert tokenizer.codebook_sizes == (4, 4, 4)
    tied = make(label_threshold=0).fit(catalog([["b", "a"], ["c", "a", "b"]], "genres"))
    assert paths(tied, catalog([["b", "a", "c"]], "genres")) == [["a", "b", "c"]]


def test_unknown_labels_of_new_items_are_left_out_and_repetitions_count_once():
    tokenizer = make(label_threshold=1).fit(MOVIES)
    new = catalog([["Musical", "Action"], ["Comedy", "Comedy"], ["Action", "Drama"]], "genres")
    assert paths(tokenizer, new) == [["Action"], ["Comedy"], ["Drama", "Action"]]


def test_at_most_five_labels_by_default():
    many = catalog([list("abcdefg")] * 12, "genre")
    tokenizer = make().fit(many)
    assert paths(tokenizer, many)[0] == list("abcde")


def test_the_threshold_is_strict():
    eleven = catalog([["x"]] * 11 + [["y"]] * 10, "class")
    tokenizer = make().fit(eleven)
    assert paths(tokenizer, eleven) == [["x"]] * 11 + [[]] * 10


# -- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        (" Action | Sci-Fi |", ["Action", "Sci-Fi"]),
        (["Beauty", None, " ", "Hair "], ["Beauty", "Hair"]),
        ([["Beauty", "Hair"], ["Gifts"]], ["Beauty", "Hair"]),
        ([], []),
        (7, ["7"]),
    ],
)
def test_labels_are_read_from_lists_text_and_numbers(value, expected):
    assert read_labels(value, "|") == expected


def test_auto_takes_the_first_known_column_and_says_which(caplog):
    logging.getLogger("genrec").propagate = True
    table = MOVIES.table.with_columns(SHOP.table["categories"])
    with caplog.at_level(logging.INFO, logger="genrec"):
        tokenizer = make().fit(Catalog(table))
    assert "column 'categories', read as hierarchy" in caplog.text
    assert paths(tokenizer, SHOP) == SHOP.table["categories"].to_list()
    with caplog.at_level(logging.INFO, logger="genrec"):
        make(label_threshold=1).fit(MOVIES)
    assert "column 'genres', read as labels" in caplog.text


def test_a_named_column_with_a_delimiter_of_its_own():
    items = catalog(["A > B", "A > C", "D"], "taxonomy")
    tokenizer = make(column="taxonomy", delimiter=">").fit(items)
    assert paths(tokenizer, items) == [["A", "B"], ["A", "C"], ["D"]]
    loaded = make(column="taxonomy", delimiter=">").load_state(tokenizer.state())
    assert paths(loaded, items) == paths(tokenizer, items)
    with pytest.raises(UserError, match="without column 'taxonomy'; it has categories"):
        tokenizer.encode(SHOP)


# -- quality and the whole way ----------------------------------------------------------------


def test_paths_are_the_planted_tree():
    items = planted(100, 1, branching=3).catalog
    codes = make().fit(items).encode(items)
    leaves = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    assert normalized_mutual_info_score(planted_leaves(items), leaves) == pytest.approx(1.0)


def test_from_fit_to_the_tree_of_a_search():
    items = Catalog(planted(100, 1, branching=3).catalog.table)  # no vectors
    index = ItemIndex.build(make().fit(items), items, collisions="extra_level")
    assert np.array_equal(index.rows_of_codes(index.codes), np.arange(100))
    assert CSRIndex.from_index(index).num_nodes == (1, 3, 9, 27, 100)


# -- bad input --------------------------------------------------------------------------------


def test_a_catalogue_without_categories_is_an_error_that_lists_its_columns():
    items = Catalog(pl.DataFrame({"item_id": ["a"], "title": ["A"], "brand": ["B"]}))
    with pytest.raises(UserError, match=r"no column of categories, .*has title, brand.*column"):
        make().fit(items)
    with pytest.raises(UserError, match=r"without column 'brnd'.*Did you mean 'brand'"):
        make(column="brnd").fit(items)
    with pytest.raises(UserError, match="column 'categories' gives no item a label"):
        make().fit(catalog([None, []], dtype=pl.List(pl.String)))
    with pytest.raises(
        UserError, match=r"more than 10 items \(the most frequent, 'Drama', is on 4"
    ):
        make().fit(MOVIES)
    with pytest.raises(UserError, match="gives no item a label"):
        make().fit(catalog([], dtype=pl.List(pl.String)))


def test_items_without_labels_share_a_branch_or_are_named(caplog):
    logging.getLogger("genrec").propagate = True
    items = catalog([["a", "b"], None, [], ["a"]], dtype=pl.List(pl.String))
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = make().fit(items)
    assert "2 of 4 items have no label in column 'categories'" in caplog.text
    assert tokenizer.encode(items)[1:3].tolist() == [[0, 0], [0, 0]]
    index = ItemIndex.build(tokenizer, items, collisions="extra_level")
    assert index.codes[1:3, -1].tolist() == [0, 1]

    strict = make(without_labels="error")
    with pytest.raises(DataError, match=r"2 item\(s\) have no known label .*'i1', 'i2'"):
        strict.fit(items)
    strict.fit(SHOP)
    with pytest.raises(DataError, match=r"1 item\(s\).*'i1'"):
        strict.encode(catalog([["Toys"], ["Food"]]))


def test_bad_settings_name_the_key():
    with pytest.raises(ConfigError, match=r"tokenizer\.max_levels: got 0"):
        make(max_levels=0)
    with pytest.raises(ConfigError, match=r"tokenizer\.kind: got 'tree'"):
        make(kind="tree")


def test_a_failed_fit_leaves_nothing_behind():
    strict = make(without_labels="error")
    with pytest.raises(DataError):
        strict.fit(catalog([["a"], None], dtype=pl.List(pl.String)))
    with pytest.raises(UserError, match="not fitted"):
        strict.encode(SHOP)
