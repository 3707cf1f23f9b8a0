"""Is only generated what the catalogue says, and do n-grams point to the items that hold them?"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding.ensemble import aggregate_ranks
from genrec.decoding.grounding import (
    GroundingConfig,
    evidence,
    ground,
    ngram_weights,
    rank_items,
    score_items,
)
from genrec.decoding.ngram_beam import FacetNgram, FacetRules, generate_ngrams
from genrec.decoding.ngrams import NgramIndex
from genrec.errors import UserError
from genrec.testing.decoding import TableModel

ID, TITLE = 1, 2  # markers
FIRST_DIGIT, FIRST_WORD, NUM_CODES = 3, 7, 13


def world(num_items: int = 14, seed: int = 0) -> dict[str, list[tuple[int, ...]]]:
    """Two facets: a number of two digits to the base of 4, and a title of 0 to 5 words out of 6."""
    rng = np.random.default_rng(seed)
    ids = [(ID, FIRST_DIGIT + n // 4, FIRST_DIGIT + n % 4) for n in rng.permutation(16)[:num_items]]
    titles = [
        (TITLE, *rng.integers(FIRST_WORD, NUM_CODES, rng.integers(0, 6)).tolist())
        for _ in range(num_items)
    ]
    return {"id": ids, "title": titles}


facet_worlds = st.builds(world, st.integers(1, 14), st.integers(0, 1000))


def ngrams_of(strings) -> Counter:
    found: Counter = Counter()
    for codes in strings:
        for start in range(len(codes)):
            found.update(codes[start:stop] for stop in range(start + 1, len(codes) + 1))
    return found


# -- the index -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(facet_worlds)
def test_the_index_holds_exactly_the_ngrams_of_the_catalogue(facets):
    index = NgramIndex.build(facets)
    assert index.num_items == len(facets["id"])
    assert index.num_tokens == sum(len(codes) for strings in facets.values() for codes in strings)
    for name, strings in facets.items():
        expected, seen = ngrams_of(strings), {}
        waiting = [((), index.root(name))]
        while waiting:
            ngram, span = waiting.pop()
            codes, children = index.children(span)
            assert codes.tolist() == sorted(codes.tolist())
            for code, child in zip(codes.tolist(), children, strict=True):
                longer = (*ngram, code)
                seen[longer] = child.count
                assert child == index.extend(span, code) == index.find(name, longer)
                rows = [r for r, s in enumerate(strings) if ngrams_of([s])[longer]]
                assert index.rows(child).tolist() == rows
                ending = any(s[-len(longer) :] == longer for s in strings)
                assert index.ends(child) == ending
                waiting.append((longer, child))
        assert seen == dict(expected)


def test_what_does_not_occur_has_no_span():
    index = NgramIndex.build(world())
    assert index.find("title", (FIRST_DIGIT,)).count == 0
    assert index.find("id", (FIRST_WORD, 99)).count == 0
    assert index.find("id", (ID, 0)).count == 0
    assert not index.ends(index.find("id", (99,)))
    assert index.children(index.find("id", (99,)))[1] == []


def test_bad_strings_are_refused():
    with pytest.raises(UserError, match="at least one facet"):
        NgramIndex.build({})
    with pytest.raises(UserError, match=r"one string for each item"):
        NgramIndex.build({"id": [(1, 2)], "title": []})
    for strings in ([(1, 2), (2, 1)], [(1, 2, 1)], [(1, 0)], [()]):
        with pytest.raises(UserError, match=r"facet 'id' of item row \d .* marker"):
            NgramIndex.build({"id": strings})
    with pytest.raises(UserError, match="Did you mean 'title'"):
        NgramIndex.build(world()).root("titel")


# -- aggregation ---------------------------------------------------------------------------------


def test_weights_are_those_of_the_paper():
    index = NgramIndex.build(world())
    config = GroundingConfig(gamma=3.0)
    ngram = FacetNgram("id", world()["id"][4], -14.0)
    s, p0 = -14.0 + 10.0, (1 + 5) / (index.num_tokens + 5)
    expected = max(0.0, math.log(math.exp(s) / (1 - math.exp(s))) - math.log(p0 / (1 - p0))) ** 3
    assert ngram_weights(index, [ngram], config)[0] == pytest.approx(expected, rel=1e-12)
    # Beyond 1/e, and below the frequency, it makes no difference.
    assert evidence(np.array([0.0]), np.array([1]), 50, smoothing=5.0) == evidence(
        np.array([-1.0]), np.array([1]), 50, smoothing=5.0
    )
    assert evidence(np.array([-9.0, -np.inf]), np.array([1, 1]), 50, smoothing=5.0).max() == 0
    assert evidence(np.array([-1.0, -1.0]), np.array([0, 50]), 50, smoothing=5.0).max() == 0


def score_slowly(facets, index, ngrams, config, unigrams) -> list[float]:
    """One item at a time, one n-gram at a time."""
    best: dict = {}
    for g in ngrams:
        best[g.facet, g.codes] = max(g.logprob, best.get((g.facet, g.codes), -math.inf))
    chosen = [FacetNgram(*key, logprob) for key, logprob in sorted(best.items())]
    weights = ngram_weights(index, chosen, config)
    order = sorted(range(len(chosen)), key=lambda i: -weights[i])
    scores = []
    for row in range(index.num_items):
        free = {name: [True] * len(strings[row]) for name, strings in facets.items()}
        covered: set[int] = set()
        score = 0.0
        for i in order:
            g, matched = chosen[i], False
            if weights[i] <= 0:
                continue
            codes, size = facets[g.facet][row], len(g.codes)
            for start in range(len(codes) - size + 1):
                inside = range(start, start + size)
                if codes[start : start + size] == g.codes and all(free[g.facet][p] for p in inside):
                    matched = True
                    for p in inside:
                        free[g.facet][p] = False
            if matched:
                own = set(g.codes)
                score += weights[i] * (1 - config.discount * len(own & covered) / len(own))
                covered |= own
        for name, logprobs in unigrams.items():
            counts = Counter(code for codes in facets[name] for code in codes)
            top = sorted(counts, key=lambda c: (-logprobs[c], c))[: config.num_unigrams]
            left = {c for c, is_free in zip(facets[name][row], free[name], strict=True) if is_free}
            for code in left & set(top):
                if code == index.marker(name) or any(g.codes == (code,) for g in chosen):
                    continue
                gain = evidence(
                    np.array([logprobs[code]]),
                    np.array([counts[code]]),
                    index.num_tokens,
                    smoothing=config.smoothing,
                )[0]
                score += gain * (1 - config.discount * (code in covered))
        scores.append(score)
    return scores


@settings(max_examples=80, deadline=None)
@given(facet_worlds, st.integers(0, 10_000))
def test_aggregation_equals_the_slow_one(facets, seed):
    index, rng = NgramIndex.build(facets), np.random.default_rng(seed)
    config = GroundingConfig(num_unigrams=4, smoothing=0.5)
    ngrams = []
    for _ in range(rng.integers(0, 14)):
        name = ("id", "title")[rng.integers(2)]
        codes = facets[name][rng.integers(len(facets[name]))]
        start = rng.integers(len(codes))
        stop = rng.integers(start + 1, len(codes) + 1)
        ngrams.append(FacetNgram(name, codes[start:stop], float(-rng.exponential(3.0))))
    logprobs = np.log(rng.dirichlet(np.full(NUM_CODES, 0.3)))
    unigrams = {"title": logprobs} if rng.random() < 0.7 else {}
    found = score_items(index, ngrams, config, unigrams=unigrams)
    assert found == pytest.approx(
        score_slowly(facets, index, ngrams, config, unigrams), rel=1e-9, abs=1e-12
    )


def test_a_repeated_ngram_counts_once_and_never_overlaps_itself():
    facets = {"title": [(TITLE, 7, 7, 7), (TITLE, 8, 9), (TITLE, 7, 7)]}
    index = NgramIndex.build(facets)
    config = GroundingConfig(num_unigrams=0, smoothing=0.1)
    scores = score_items(index, [FacetNgram("title", (7, 7), -1.0)], config)
    assert scores[0] == scores[2] > 0 and scores[1] == 0


def test_covered_codes_count_less():
    facets = {"title": [(TITLE, 7, 8, 9), (TITLE, 9, 10, 11), *[(TITLE, 12)] * 9]}
    index = NgramIndex.build(facets)
    config = GroundingConfig(num_unigrams=0, smoothing=0.1)
    first, second = FacetNgram("title", (7, 8), -1.0), FacetNgram("title", (9,), -2.0)
    w1, w2 = ngram_weights(index, [first, second], config)
    assert score_items(index, [first, second], config)[0] == pytest.approx(w1 + w2)
    facets["title"][0] = (TITLE, 7, 8, 8)
    index = NgramIndex.build(facets)
    again = FacetNgram("title", (8,), -2.0)
    w1, w2 = ngram_weights(index, [first, again], config)
    assert score_items(index, [first, again], config)[0] == pytest.approx(w1 + w2 * (1 - 0.8))


def test_ranking_pads_what_nothing_speaks_for():
    rows, scores = rank_items(np.array([[0.0, 2.0, 0.5, 2.0], [0.0] * 4]), 3)
    assert rows.tolist() == [[1, 3, 2], [-1, -1, -1]]
    assert scores.tolist() == [[2.0, 2.0, 0.5], [0.0, 0.0, 0.0]]
    with pytest.raises(UserError, match="k: got 0"):
        rank_items(np.zeros((1, 2)), 0)


# -- generation ----------------------------------------------------------------------------------


def table(seed: int = 0, scale: float = 1.0) -> TableModel:
    return TableModel((NUM_CODES,) * 12, seed=seed, scale=scale)


def logprob_of(model: TableModel, request: int, marker: int, codes) -> float:
    total, prefix = 0.0, (marker,)
    for code in codes:
        total += float(torch.log_softmax(model.logits(request, prefix).double(), 0)[code])
        prefix = (*prefix, code)
    return total


@pytest.mark.parametrize("width", [1, 3, 100])
def test_every_generated_ngram_occurs_and_has_the_models_logprob(width):
    facets, model = world(), table()
    index = NgramIndex.build(facets)
    for facet, marker, whole in (("id", ID, True), ("title", TITLE, False), ("title", TITLE, True)):
        rules = FacetRules(width=width, whole=whole, max_length=4)
        batch = torch.tensor([5, 9, 2])
        made = generate_ngrams(model, batch, index, facet, rules)
        known = ngrams_of(facets[facet])
        for request, ngrams in zip(batch.tolist(), made.ngrams, strict=True):
            assert len({g.codes for g in ngrams}) == len(ngrams)
            for g in ngrams:
                assert known[g.codes] > 0
                if whole:
                    assert g.codes in facets[facet]
                content = g.codes[1:] if whole else g.codes
                assert marker not in content and 1 <= len(content) <= 4
                assert g.logprob == pytest.approx(logprob_of(model, request, marker, content))
        assert any(made.ngrams) or width == 1


def test_a_wide_beam_generates_everything_there_is():
    facets = world()
    index = NgramIndex.build(facets)
    batch = torch.tensor([0])
    made = generate_ngrams(table(), batch, index, "id", FacetRules(width=500, whole=True))
    assert {g.codes for g in made.ngrams[0]} == set(facets["id"])
    made = generate_ngrams(table(), batch, index, "title", FacetRules(width=500))
    expected = {g for g in ngrams_of(facets["title"]) if TITLE not in g}
    assert {g.codes for g in made.ngrams[0]} == expected


def test_requests_do_not_disturb_each_other():
    index, rules = NgramIndex.build(world()), FacetRules(width=4)
    together = generate_ngrams(table(), torch.tensor([3, 8, 1]), index, "title", rules)
    for place, request in enumerate((3, 8, 1)):
        alone = generate_ngrams(table(), torch.tensor([request]), index, "title", rules)
        assert alone.ngrams[0] == together.ngrams[place]


class Certain(TableModel):
    """Says one item's id with certainty, and of titles whatever the table says."""

    def __init__(self, wanted: dict[int, tuple[int, ...]]) -> None:
        super().__init__((NUM_CODES,) * 12, scale=0.5)
        self.wanted = wanted

    def logits(self, request, prefix):
        wanted = self.wanted[request]
        if prefix and prefix[0] == ID and wanted[: len(prefix)] == prefix:
            if len(prefix) < len(wanted):
                return torch.full((NUM_CODES,), -1e4).index_fill(
                    0, torch.tensor(wanted[len(prefix)]), 0.0
                )
        return super().logits(request, prefix)


def test_an_item_whose_id_is_generated_with_certainty_ranks_first():
    facets = world()
    index, batch = NgramIndex.build(facets), torch.arange(14)
    model = Certain(dict(enumerate(facets["id"])))
    rows, scores = ground(model, {"id": batch, "title": batch}, index, GroundingConfig(), k=3)
    assert rows[:, 0].tolist() == list(range(14))
    assert (np.diff(scores, axis=1) <= 0).all()
    rows, _ = ground(model, {"id": batch}, index, GroundingConfig(), k=3)
    assert rows[:, 0].tolist() == list(range(14))


def test_several_facets_together_find_what_none_finds_alone():
    """The title says "one of these", the id says "one of those": only one item is both."""
    facets = {
        "id": [(ID, 3, 4), (ID, 3, 5), (ID, 4, 4), (ID, 4, 5)],
        "title": [(TITLE, 7, 8), (TITLE, 9, 10), (TITLE, 7, 8), (TITLE, 9, 10)],
    }
    index = NgramIndex.build(facets)
    config = GroundingConfig(
        facets={"id": FacetRules(bias=0.0), "title": FacetRules()}, smoothing=0.1, num_unigrams=0
    )
    id_says, title_says = FacetNgram("id", (ID, 3), -1.0), FacetNgram("title", (7, 8), -1.0)
    assert np.ptp(score_items(index, [id_says], config)[[0, 1]]) == 0
    both = score_items(index, [id_says, title_says], config)
    assert both.argmax() == 0 and (np.delete(both, 0) < both[0]).all()


def test_bad_calls_are_named():
    index, batch = NgramIndex.build(world()), torch.tensor([0, 1])
    with pytest.raises(UserError, match="the model has 5 codes, the strings use 13"):
        ground(TableModel((5,) * 4), {"id": batch}, index, GroundingConfig(), k=1)
    with pytest.raises(UserError, match="got batches for price"):
        ground(table(), {"price": batch}, index, GroundingConfig(), k=1)
    with pytest.raises(UserError, match="expected the same for every facet"):
        ground(table(), {"id": batch, "title": batch[:1]}, index, GroundingConfig(), k=1)
    for facet, codes in (("price", (3,)), ("id", ())):
        with pytest.raises(UserError, match="at least one code of one of id, attributes, title"):
            score_items(index, [FacetNgram(facet, codes, -1.0)], GroundingConfig())


# -- ensembles -----------------------------------------------------------------------------------


def test_rank_aggregation_sums_discounted_gains():
    lists = np.array([[[4, 7, 2], [1, -1, -1]], [[7, 9, 4], [-1, -1, -1]]])
    rows, scores = aggregate_ranks(lists, 4)
    first, second, third = 1.0, 1 / math.log2(3), 0.5
    assert rows.tolist() == [[7, 4, 9, 2], [1, -1, -1, -1]]
    assert scores[0].tolist() == pytest.approx([first + second, first + third, second, third])
    assert scores[1].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_rank_aggregation_of_one_list_is_that_list_and_ties_go_by_row():
    one = np.random.default_rng(0).permutation(30)[None, None, :8]
    assert aggregate_ranks(one, 8)[0].tolist() == one[0].tolist()
    assert aggregate_ranks(np.array([[[5, 3]], [[3, 5]]]), 2)[0].tolist() == [[3, 5]]
    with pytest.raises(UserError, match="holds an item twice"):
        aggregate_ranks(np.array([[[5, 5]]]), 2)
    with pytest.raises(UserError, match=r"got rows of shape \(1, 2\) and k=2"):
        aggregate_ranks(np.array([[5, 5]]), 2)
