"""Textual ids: unique phrases, generated from the text, taught by a frozen recommender."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import T5Config, T5ForConditionalGeneration

from genrec.artifacts import fingerprint
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex, Trie, beam_search, reference_beam_search
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import END, ItemIndex
from genrec.models.base import FIRST_TOKEN, Batch, pad_histories
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers.collisions.candidates import first_unused
from genrec.tokenizers.text.phrase_generator import _pick
from genrec.tokenizers.text.salient_words import salient_phrases
from genrec.tokenizers.textual import AlternationConfig, Textual
from genrec.trainers.alternation import (
    GeneratorTrainer,
    alternate,
    expected_embeddings,
    refine,
    spliced_loss,
    warm_start,
)

SMALL = {"d_model": 16, "d_ff": 16, "num_heads": 2, "vocabulary_size": 300, "max_text_tokens": 24}
WORDS = ["red", "blue", "green", "big", "small", "cat", "dog", "fish"]


def make(**settings) -> Textual:
    return Textual(Textual.Config(**{**SMALL, "num_epochs": 1, "max_tokens": 4, **settings}))


def animals(num_items: int = 24) -> Catalog:
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(num_items)]
    ids = [f"i{row:02}" for row in range(num_items)]
    return Catalog(pl.DataFrame({"item_id": ids, "title": titles}))


def backbone(kind: type, index: ItemIndex, **settings):
    small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "max_history": 4}
    torch.manual_seed(0)
    return kind.from_index(kind.Config(**{**small, **settings}), index)


def digest(model: torch.nn.Module) -> str:
    return fingerprint(*(p.detach().cpu().numpy() for _, p in sorted(model.named_parameters())))


@pytest.fixture(scope="module")
def tokenizer() -> Textual:
    return make(alternation=AlternationConfig(rounds=2, learning_rate=3e-2)).fit(animals())


@pytest.fixture(scope="module")
def index(tokenizer: Textual) -> ItemIndex:
    return ItemIndex.build(tokenizer, animals(), collisions="first_unused")


class TestTextual(TokenizerContract):
    config: ClassVar[dict] = {"name": "textual", **SMALL, "num_epochs": 1, "max_tokens": 4}


# -- what the generator learns ----------------------------------------------------------------


def test_salient_words_go_from_coarse_to_fine():
    texts = ["the cat x1", "the cat dog", "the dog", "the dog bird", "the bird"]
    assert salient_phrases(texts, 2)[:2] == ["cat x1", "dog cat"]
    assert salient_phrases(texts, 1)[0] == "cat"  # a word that another item shares comes first
    assert salient_phrases(["...", "🚀"], 2) == ["...", "🚀"]
    assert salient_phrases(["cat", "🚀"], 2) == ["cat", "🚀"]


def test_it_learns_to_name_items_by_their_own_words():
    catalog = animals(12)
    fitted = make(
        d_model=32, d_ff=32, num_heads=4, num_epochs=60, batch_size=6, num_words=2, max_tokens=8
    ).fit(catalog)
    assert fitted.history[-1] < 0.2 * fitted.history[0]
    phrases = [fitted.text_of(row) for row in fitted.encode(catalog)]
    own = [
        word in text.split()
        for phrase, text in zip(phrases, fitted.texts(catalog), strict=True)
        for word in phrase.split()
    ]
    assert np.mean(own) > 0.9
    again = fitted.text_of(fitted.encode(catalog.select([3]))[0])
    assert again == phrases[3]


def test_the_order_of_the_catalogue_changes_nothing():
    catalog = animals()
    order = np.random.default_rng(1).permutation(len(catalog))
    one, other = make().fit(catalog), make().fit(catalog.select(order))
    assert digest(one.generator) == digest(other.generator)
    assert np.array_equal(one.encode(catalog)[order], other.encode(catalog.select(order)))


def test_global_random_numbers_stay_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fitted = make().fit(animals(4))
    make().load_state(fitted.state())
    assert torch.equal(torch.rand(1), expected)


def test_items_without_text(caplog):
    catalog = Catalog(
        pl.DataFrame({"item_id": ["a", "b"], "title": ["red cat", None], "year": [None, None]})
    )
    with caplog.at_level(logging.WARNING, logger="genrec"):
        make().fit(catalog)
    assert "1 of 2 items have no text" in caplog.text and "'b'" in caplog.text
    with pytest.raises(DataError, match=r"1 item\(s\) have no text in any column"):
        make(missing="error").fit(catalog)
    with pytest.raises(UserError, match="got no items"):
        make().fit(catalog.select([]))
    with pytest.raises(ConfigError, match="num_heads: got 3 for d_model 16"):
        make(num_heads=3)


# -- unique ids -------------------------------------------------------------------------------


def test_later_groups_pay_for_codes_that_earlier_groups_took():
    logprobs = torch.log(torch.tensor([[[0.1, 0.6, 0.3]] * 3]))
    live = torch.ones(1, 3, dtype=torch.bool)
    assert _pick(logprobs, live, 0.0).tolist() == [[1, 1, 1]]
    assert _pick(logprobs, live, 1.0).tolist() == [[1, 2, 1]]  # log .6 - 1 < log .3 < log .6
    assert _pick(logprobs, live, 3.0).tolist() == [[1, 2, 0]]
    live[0, 0] = False
    assert _pick(logprobs, live, 3.0).tolist() == [[END, 1, 2]]


def test_all_ids_are_unique_and_an_unshared_phrase_is_kept(tokenizer, index):
    codes = tokenizer.encode(animals())
    first = {}
    for row, item_codes in enumerate(map(tuple, codes.tolist())):
        first.setdefault(item_codes, row)
    kept = sorted(first.values())
    assert len(kept) < len(codes), "the test needs collisions"
    assert np.array_equal(index.codes[kept, : codes.shape[1]], codes[kept])
    assert len(np.unique(index.codes, axis=0)) == len(codes)


def test_candidates_are_asked_for_only_by_those_who_come_too_late():
    codes = np.array([[1, 0], [1, 0], [1, 0], [2, 0], [1, 0]])
    asked = []

    def candidates(rows, attempt):
        asked.append((rows.tolist(), attempt))
        options = {0: [[2, 0, 0], [1, 2, 0]], 1: [[1, 2, 0], [1, 2, 3]]}
        return np.array([options[attempt]] * len(rows)) if attempt in options else None

    ids = ["e", "d", "c", "b", "a"]  # the last row comes first
    unique, sizes = first_unused(codes, (4, 4), ids, candidates=candidates)
    assert asked == [([2, 1, 0], 0), ([1, 0], 1), ([0], 2)]
    # row 2 takes [1, 2], row 1 a longer one; row 0 finds nothing and is numbered with row 4
    assert unique.tolist() == [[1, 5, 0], [1, 2, 3], [1, 2, 0], [2, 0, 0], [1, 4, 0]]
    assert sizes == (6, 6, 6)


def test_first_unused_needs_candidates():
    with pytest.raises(UserError, match="proposes one semantic ID per item"):
        first_unused(np.array([[1]]), (2,), ["a"])


def test_longer_phrases_continue_the_best_one(tokenizer):
    catalog = animals().select([0, 1, 2])
    best = tokenizer.encode(catalog)
    last = len(tokenizer.config.diversity_penalties)
    longer = tokenizer.candidates(catalog, last)
    for own, options in zip(best, longer, strict=True):
        length = (own != END).sum()
        assert np.array_equal(options[0, :length], own[:length]) and options[0, length] != END
    assert longer.shape == (3, 10, best.shape[1] + tokenizer.config.lengthen)
    assert tokenizer.candidates(catalog, last + 1) is None


def test_candidates_of_an_item_do_not_depend_on_the_others(tokenizer):
    catalog = animals()
    together = tokenizer.candidates(catalog, 0)
    assert np.array_equal(tokenizer.candidates(catalog.select([7]), 0)[0], together[7])
    assert len(np.unique(together[7], axis=0)) > 1


def test_numbers_are_the_last_resort_and_can_be_read():
    catalog = Catalog(pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["red cat"] * 3}))
    fitted = make(num_candidates=1, diversity_penalties=[], lengthen=0).fit(catalog)
    index = ItemIndex.build(fitted, catalog, collisions="first_unused")
    texts = [fitted.text_of(row) for row in index.codes]
    assert [text[-3:] for text in texts] == [" #1", " #2", " #3"]
    assert len({text[:-3] for text in texts}) == 1


def test_every_item_is_reachable(index):
    model = backbone(DecoderOnly, index).eval()
    batch = pad_histories([[0, 1]], 4)
    for search, tree in ((beam_search, CSRIndex), (reference_beam_search, Trie)):
        found = search(model, batch, tree.from_index(index), width=len(index), k=len(index))
        assert np.array_equal(np.sort(found.rows_Bk.numpy())[0], np.arange(len(index)))


# -- a pretrained generator -------------------------------------------------------------------


def test_a_pretrained_model_says_only_words_of_the_catalogue(tmp_path):
    words = ["<pad>", "</s>", "<unk>", *("▁" + word for word in (*WORDS, "other", "more"))]
    vocabulary = {word: place for place, word in enumerate(words)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Metaspace()
    words_only.decoder = decoders.Metaspace()
    words_only.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(words), decoder_start_token_id=0, **small)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    catalog = animals()

    fitted = make(generator=str(tmp_path)).fit(catalog)
    index = ItemIndex.build(fitted, catalog, collisions="first_unused")
    spoken = {word for row in index.codes for word in fitted.text_of(row).split(" #")[0].split()}
    assert spoken and spoken <= set(WORDS)
    for file in tmp_path.iterdir():  # the state is all that is needed
        file.unlink()
    again = Textual(fitted.config).load_state(fitted.state())
    assert np.array_equal(again.encode(catalog), fitted.encode(catalog))
    assert not any(str(tmp_path).encode() in array.tobytes() for array in fitted.state().values())


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no sub-words at"):
        make(generator=str(tmp_path / "nowhere")).fit(animals())
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.generator: got .*no sequence-to-sequence"):
        make(generator=str(tmp_path)).fit(animals())


# -- alternation ------------------------------------------------------------------------------


def test_the_expected_embedding_of_a_certain_code_is_its_embedding():
    weight = torch.randn(7, 5)
    codes = torch.tensor([[3, 0], [6, 6]])
    one_hot = torch.nn.functional.one_hot(codes, 7).float()
    assert torch.equal(expected_embeddings(one_hot, weight), weight[codes])
    mixed = expected_embeddings(torch.tensor([0.25, 0, 0.75, 0, 0, 0, 0]), weight)
    assert torch.allclose(mixed, 0.25 * weight[0] + 0.75 * weight[2])


@pytest.mark.parametrize("kind", [DecoderOnly, EncoderDecoder])
@pytest.mark.parametrize("tied", [True, False])
def test_splicing_plain_embeddings_is_the_plain_model(kind, tied, index):
    model = backbone(kind, index, tie_embeddings=tied).eval()
    history, target = torch.tensor([[3, 5, 3], [7, -1, -1]]), torch.tensor([2, 9])
    rows = torch.tensor([3, 5, 7])
    embeddings = model.embedding(model.tokens_NL[rows]).detach()
    places = torch.tensor([[0, 1, 0], [2, -1, -1]])
    loss = spliced_loss(model, embeddings, places, target)
    logits, state = model.begin(Batch(history))
    expected = 0.0
    live = torch.ones(2, dtype=torch.bool)
    for level in range(index.num_levels):
        codes = model.tokens_NL[target, level] - FIRST_TOKEN
        expected = expected - (logits.log_softmax(-1)[torch.arange(2), codes] * live).sum() / 2
        live = live & (codes != END)
        if level + 1 < index.num_levels:
            logits, state = model.step(codes, state, torch.arange(2))
    assert torch.allclose(loss, expected, atol=1e-6)
    if kind is EncoderDecoder:
        assert torch.allclose(loss, model.loss(Batch(history, target)).loss, atol=1e-5)


@pytest.mark.parametrize("kind", [DecoderOnly, EncoderDecoder])
def test_one_step_changes_the_generator_and_not_the_recommender(kind, tokenizer, index):
    model = backbone(kind, index).train()
    learner = GeneratorTrainer(tokenizer, index, model, animals())
    before = digest(model), digest(tokenizer.generator)
    generator = learner.tokenizer.generator
    assert digest(generator) == before[1]
    batch = pad_histories([[3, 5], [7], [1, 2, 3, 4]], 4, targets=[2, 9, 0])
    losses = [learner.step(batch) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert (digest(model), digest(tokenizer.generator)) == before
    assert digest(generator) != before[1]
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_numbers_of_collisions_and_ends_keep_their_embeddings(tokenizer):
    catalog = animals()
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    model = backbone(DecoderOnly, index)
    learner = GeneratorTrainer(tokenizer, index, model, catalog)
    codes = torch.from_numpy(index.codes.astype(np.int64))
    plain = model.embedding(codes + FIRST_TOKEN)
    found = learner.item_embeddings(torch.arange(len(index)))
    fixed = (codes == END) | (codes >= tokenizer.codebook_sizes[0])
    assert (codes >= tokenizer.codebook_sizes[0]).any()
    assert torch.equal(found[fixed], plain[fixed])
    assert not torch.isclose(found[~fixed], plain[~fixed]).all()


def test_rounds_give_unique_ids_and_leave_the_first_tokenizer_alone(tokenizer):
    data = planted(24, num_users=20, seed=1, branching=2)
    catalog = animals()
    before = digest(tokenizer.generator)
    trained = []

    def train(index, earlier):
        model = backbone(DecoderOnly, index)
        trained.append(index)
        return model if earlier is None else warm_start(model, earlier)

    rounds = alternate(tokenizer, catalog, data.interactions, train)
    assert len(rounds) == len(trained) == 3
    assert digest(tokenizer.generator) == before
    assert len({digest(each.tokenizer.generator) for each in rounds}) == 3
    for each in rounds:
        assert len(np.unique(each.index.codes, axis=0)) == len(catalog)
        assert each.model.codebook_sizes == each.index.codebook_sizes
    assert np.isnan(rounds[0].generator_loss) and np.isfinite(rounds[2].generator_loss)
    again = refine(tokenizer, rounds[0].index, rounds[0].model, catalog, data.interactions)
    assert digest(again[0].generator) == digest(rounds[1].tokenizer.generator)


def test_a_warm_start_copies_what_both_have(index):
    earlier = backbone(DecoderOnly, index)
    wider = ItemIndex(
        index.item_ids,
        np.pad(index.codes, ((0, 0), (0, 1))),
        (index.codebook_sizes[0] + 2,) * (index.num_levels + 1),
        True,
    )
    later = DecoderOnly.from_index(earlier.config, wider)
    rest = later.embedding.weight[-2:].clone()
    warm_start(later, earlier)
    assert torch.equal(later.embedding.weight[:-2], earlier.embedding.weight)
    assert torch.equal(later.embedding.weight[-2:], rest)
    assert torch.equal(later.layers[0].qkv.weight, earlier.layers[0].qkv.weight)


def test_what_does_not_belong_together_is_refused(tokenizer, index):
    catalog, model = animals(), backbone(DecoderOnly, index)
    levels = ItemIndex(index.item_ids, np.arange(24)[:, None], (24,))
    with pytest.raises(UserError, match=r"expected at least the .* one shared vocabulary"):
        GeneratorTrainer(tokenizer, levels, model, catalog)
    with pytest.raises(UserError, match="a model that was trained on this index"):
        GeneratorTrainer(tokenizer, index.remove(["i00"]), model, catalog)
    with pytest.raises(UserError, match="does not list the items"):
        GeneratorTrainer(tokenizer, index, model, catalog.select(range(24)[::-1]))
    with pytest.raises(UserError, match="softmax=vocabulary"):
        GeneratorTrainer(
            tokenizer, index, backbone(DecoderOnly, index, softmax="vocabulary"), catalog
        )
