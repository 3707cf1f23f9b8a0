"""Does a language model that is asked in words answer with items, and does text lead to the right
ones?"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from genrec.asking import Asker
from genrec.bundle import build_model
from genrec.config import parse
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex
from genrec.decoding.beam import beam_search
from genrec.decoding.free_text import Prompts, TextTree, generate
from genrec.decoding.text_grounding import BM25, by_turns, distance_scores, round_robin
from genrec.errors import ConfigError, UserError
from genrec.inference import search
from genrec.item_index import ItemIndex
from genrec.testing.language_models import tiny_language_model
from genrec.titles import TitleConfig, TitleRecommender

DATA = planted(16, 20, 0, branching=2, length=(4, 6))
TRAINING = DATA.interactions.training()
NAMES = ["".join(letters) for letters in product("bdfg", "ao", "lr")]
NAMES[9] = NAMES[2]  # two items of one title
NAMES[15] = ""  # and one without
TABLE = DATA.catalog.table.with_columns(pl.Series("title", NAMES))
CATALOG = Catalog(TABLE, DATA.catalog.vectors)
CODES = np.stack([np.arange(16) // 4, np.arange(16) % 4], 1).astype(np.int32)
INDEX = ItemIndex(tuple(CATALOG.item_ids), CODES, (4, 4))
CONSTRAINT = CSRIndex.from_index(INDEX)
HISTORIES = [np.array([3, 1, 4]), np.array([15]), np.array([], np.int64), np.array([9, 2, 6, 5, 3])]


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def asker(request, tmp_path_factory) -> Asker:
    folder = tmp_path_factory.mktemp("bases") / request.param
    longer = {"llama": {"max_position_embeddings": 2048}, "gpt2": {"n_positions": 2048}, "t5": {}}
    tiny_language_model(folder, request.param, **longer[request.param])
    kind = "seq2seq" if request.param == "t5" else "causal"
    section = {
        "name": f"pretrained_{kind}",
        "source": str(folder),
        "max_history": 4,
        "prefix": "Items:",
        "init_noise": 1.0,
        "tuning": {"mode": "frozen"},
    }
    return Asker(build_model(section, INDEX, seed=0), CATALOG)


# -- items ---------------------------------------------------------------------------------------


def test_a_prompt_in_the_models_own_words_is_the_search_of_a_history(asker):
    histories = [history for history in HISTORIES if len(history)]
    prompts = [("Items:", *history[-4:].tolist()) for history in histories]
    found = asker.items(prompts, CONSTRAINT, k=5, width=16, batch_size=2)
    expected = search(asker.model, CONSTRAINT, histories, width=16, k=5)
    assert np.array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert found.certified.all() and (found.num_eligible == 16).all()
    without = asker.items(prompts, CONSTRAINT, k=5, width=16, exclude=histories)
    for rows, history in zip(without.rows, histories, strict=True):
        assert not set(rows) & set(history)
    assert without.num_eligible.tolist() == [13, 15, 11]


def test_the_words_of_a_question_are_those_of_the_first_template_that_fits(asker):
    assert asker.word("item_search", {"query": "red"}) == ("Search for: red\nBest item:",)
    both = asker.word("item_search", {"query": "red", "history": asker.history([1, 2, 3, 4, 5])})
    assert [piece for piece in both if isinstance(piece, int)] == [2, 3, 4, 5]
    with pytest.raises(UserError, match=r"task: got 'serach', expected one of"):
        asker.word("serach", {})
    with pytest.raises(UserError, match="no template asks with candidates, query alone"):
        asker.word("item_search", {"query": "a", "candidates": "b"})


def test_what_cannot_be_asked_is_refused(asker):
    section = {"name": "decoder_only", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    deaf: Any = build_model(section, INDEX, seed=0)
    with pytest.raises(UserError, match="got a DecoderOnly, which reads no text"):
        Asker(deaf, CATALOG)
    with pytest.raises(UserError, match="a catalogue of 3 items for a model of 16"):
        Asker(asker.model, CATALOG.select([0, 1, 2]))
    with pytest.raises(UserError, match="got 0 prompts"):
        asker.prompts([])


# -- free text -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_wide_beam_writes_the_most_probable_texts(asker):
    """All texts of at most two tokens of a small alphabet, one by one, and by the beam."""
    prompts = asker.prompts([("Once",), ("A longer prompt",)])
    ends, limit = [3], 7
    found = generate(asker.model, prompts, ends=ends, num_tokens=limit, num_texts=30, max_tokens=2)
    for number in range(2):
        scores = {}
        tokens = prompts.tokens_BT[number : number + 1, : int(prompts.lengths_B[number])]
        length = prompts.lengths_B[number : number + 1]
        hidden, state = asker.model.read_tokens(tokens, length)
        first = asker.model.vocabulary_scores(hidden).log_softmax(-1)[0]
        scores[()] = float(first[3])
        for token in set(range(limit)) - {3}:
            after, _ = asker.model.extend_tokens(torch.tensor([token]), state, torch.tensor([0]))
            second = asker.model.vocabulary_scores(after).log_softmax(-1)[0]
            for last in range(limit):
                text = (token,) if last == 3 else (token, last)
                scores[text] = float(first[token] + second[last])
        best = sorted(scores, key=lambda text: -scores[text])[:20]
        assert [text.tokens for text in found[number]][:10] == best[:10]
        for text in found[number][:20]:
            assert text.logprob == pytest.approx(scores[text.tokens], abs=1e-4)
            assert text.ended == (len(text.tokens) < 2)


def test_draws_are_the_same_again_and_texts_end(asker):
    prompts = [("Say:",), ("Tell:",)]
    options = {"num_texts": 3, "max_tokens": 6, "temperature": 1.0}
    one = asker.texts(prompts, seed=4, **options)
    assert one == asker.texts(prompts, seed=4, **options)
    assert one != asker.texts(prompts, seed=5, **options)
    assert [len(texts) for texts in one] == [3, 3]
    assert all(a[1] >= b[1] for texts in one for a, b in pairwise(texts))
    for wrong in ({"num_texts": 0}, {"max_tokens": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="generate: got"):
            asker.texts(prompts, **wrong)


def test_the_probabilities_of_all_texts_of_a_tree_sum_to_one(asker):
    texts = [asker.encoder.text(f" {name}") for name in dict.fromkeys(NAMES) if name]
    tree = TextTree(texts, asker.ends[0])
    beams = beam_search(
        tree.walker(asker.model), asker.prompts([("Next:",)] * 2), tree.constraint, width=20, k=14
    )
    assert (beams.rows_Bk >= 0).all() and beams.certified_B.all()
    totals = beams.logprobs_Bk.double().exp().sum(1)
    torch.testing.assert_close(totals, torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
    for wrong in ([], [[]], [[asker.ends[0]]]):
        with pytest.raises(UserError, match="TextTree: got"):
            TextTree(wrong, asker.ends[0])


# -- from text to items --------------------------------------------------------------------------


def test_bm25_is_what_its_formula_says():
    texts = ["red car", "red red bus", "blue bus stop", "a car"]
    found = BM25(texts, k1=1.5, b=0.5).scores(["red bus", "Car!", "tram"])
    lengths = [2, 3, 3, 2]
    rarity = np.log1p((4 - 2 + 0.5) / (2 + 0.5))

    def weight(count: int, length: int) -> float:
        return rarity * count * 2.5 / (count + 1.5 * (0.5 + 0.5 * length / 2.5))

    expected = [weight(c, n) for c, n in zip([1, 2, 0, 0], lengths, strict=True)]
    expected = np.array(expected) + [
        weight(c, n) for c, n in zip([0, 1, 1, 0], lengths, strict=True)
    ]
    np.testing.assert_allclose(found[0], expected)
    assert found[1].argmax() in (0, 3) and not found[2].any()
    for title in range(4):
        assert BM25(texts).scores([texts[title]])[0].argmax() == title
    with pytest.raises(UserError, match="BM25: got k1=-1"):
        BM25(texts, k1=-1)
    with pytest.raises(UserError, match="2 texts without a word"):
        BM25(["", "?"])


def test_lists_of_several_texts_are_merged():
    scores = np.array([[3.0, 2, 1, 0, 0], [5.0, 0, 0, 4, 0], [0.0, 0, 0, 0, 0]])
    assert by_turns(scores, 4).tolist() == [0, 1, 3, -1]
    assert by_turns(scores, 2).tolist() == [0, 3]
    assert by_turns(scores[2:], 2).tolist() == [-1, -1]
    merged = round_robin(scores, np.log([0.6, 0.3, 0.1]), 5)
    assert merged.tolist() == [0, 1, 3, 2, -1]
    other = round_robin(scores[:2], np.log([0.2, 0.8]), 3)
    assert other.tolist() == [0, 3, 1]
    assert round_robin(scores[:0], np.zeros(0), 2).tolist() == [-1, -1]


def test_an_exact_embedding_is_nearest_and_popularity_breaks_the_rest():
    items = np.random.default_rng(0).normal(size=(6, 3))
    found = distance_scores(items[[4]], items)
    assert found[0].argmax() == 4 and found[0, 4] == pytest.approx(0, abs=1e-7)
    popularity = np.array([0, 1, 2, 3, 4, 5.0])
    zero = distance_scores(items[[1]], items, popularity_N=popularity, gamma=0.0)
    np.testing.assert_allclose(zero, distance_scores(items[[1]], items))
    moved = distance_scores(items[[1]], items, popularity_N=popularity, gamma=1.0)
    np.testing.assert_allclose(moved[0, 5], zero[0, 5] / 2)
    with pytest.raises(UserError, match="without popularity"):
        distance_scores(items, items, gamma=1.0)


def test_an_exact_title_leads_to_its_item(asker):
    """Whatever the model, when it writes a title the item of that title comes first."""
    titles = [name for name in NAMES if name]
    embedded = asker.embed([f" {title}" for title in titles])
    alone = np.concatenate([asker.embed([f" {title}"]) for title in titles])
    scores = distance_scores(alone, embedded)
    words = BM25(titles).scores(titles)
    for found in (scores, words):
        first = [titles[row] for row in found.argmax(1)]
        assert first == titles


@pytest.mark.parametrize("grounding", ["tree", "bm25", "distance"])
def test_titles_recommend_items(asker, grounding):
    options = {"grounding": grounding, "max_tokens": 4, "num_texts": 3, "num_demonstrations": 2}
    recommender = TitleRecommender(asker, TRAINING, parse(TitleConfig, options))
    found = recommender.recommend(HISTORIES, 6)
    again = recommender.recommend(HISTORIES[::-1], 6, batch_size=1)
    assert np.array_equal(found.rows, again.rows[::-1])
    assert 15 not in found.rows and found.rows.shape == (4, 6)
    for rows in found.rows:
        kept = rows[rows >= 0]
        assert len(set(kept)) == len(kept)
    masked = recommender.recommend(HISTORIES, 6, exclude_seen=True)
    for rows, history in zip(masked.rows, HISTORIES, strict=True):
        assert not set(rows) & set(history.tolist())
    if grounding == "tree":
        assert (found.rows >= 0).all() and (np.diff(found.scores, axis=1) <= 1e-6).all()
        for rows, scores in zip(found.rows.tolist(), found.scores, strict=True):
            if 2 in rows and 9 in rows:  # one title, two items
                assert rows.index(9) == rows.index(2) + 1
                assert scores[rows.index(9)] == scores[rows.index(2)]
    else:
        assert all(len(texts) == (3 if grounding == "bm25" else 1) for texts in found.texts)
    prompts = recommender.prompts(HISTORIES)
    assert all(prompt[0].count("\n\n") == 2 for prompt in prompts)
    bare = TitleRecommender(asker, TRAINING, TitleConfig()).prompts(HISTORIES)
    assert all(p[0].endswith(b[0]) for p, b in zip(prompts, bare, strict=True))


def test_a_catalogue_without_titles_is_refused(asker):
    bare = Asker(asker.model, Catalog(TABLE.drop("title"), CATALOG.vectors))
    with pytest.raises(UserError, match="a catalogue without titles"):
        TitleRecommender(bare, TRAINING)
    with pytest.raises(ConfigError, match=r"grounding: got 'tri'"):
        parse(TitleConfig, {"grounding": "tri"})
    with pytest.raises(UserError, match="expected an integer >= 1"):
        TitleRecommender(asker, TRAINING).recommend(HISTORIES, 0)
    held_out = parse(TitleConfig, {"num_demonstrations": 1})
    with pytest.raises(UserError, match=r"Pass interactions\.training\(\)"):
        TitleRecommender(asker, DATA.interactions, held_out)
    with pytest.raises(UserError, match="got no interactions for num_demonstrations=1"):
        TitleRecommender(asker, None, held_out)


def test_prompts_know_how_many_they_are():
    assert len(Prompts(torch.zeros(2, 3), torch.ones(2))) == 2
