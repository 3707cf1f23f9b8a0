"""Which items do generated n-grams of several facets point to? (TransRec, 2310.06491, section 3.3.)

It turns n-grams with log-probabilities into a score per item. What n-grams there are is in
`ngrams.py`, how they are generated in `ngram_beam.py`.

Shapes: B requests, V codes, N items, S positions of the text, P occurrences of an n-gram, k list
length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig
from genrec.decoding.ngram_beam import FacetNgram, FacetRules, FloatArray, generate_ngrams
from genrec.decoding.ngrams import IntArray, NgramIndex
from genrec.decoding.protocol import NO_ROW, StepModel
from genrec.errors import UserError

LARGEST_LOGPROB = -1.0
"""Where certainty ends: what is more probable than 1/e weighs no more."""


class GroundingConfig(StrictConfig):
    """Settings of grounding by facets."""

    facets: dict[str, FacetRules] = Field(
        default={
            "id": FacetRules(bias=10.0, whole=True),
            "attributes": FacetRules(bias=5.0, whole=True, max_length=15),
            "title": FacetRules(),
        }
    )
    """Facets to generate, by name."""
    gamma: float = Field(default=2.0, gt=0)
    """Exponent of a weight (the paper: 2 to 3)."""
    discount: float = Field(default=0.8, ge=0, le=1)
    """What an n-gram loses if all of its codes were already covered (the paper: 0.8)."""
    smoothing: float = Field(default=5.0, gt=0)
    """Added to the count of an n-gram and to the number of all tokens."""
    num_unigrams: int = Field(default=1000, ge=0)
    """Most probable single codes that back up what no n-gram covers; 0: none (SEAL: 1000)."""


def evidence(
    logprobs: FloatArray, counts: IntArray, num_tokens: int, *, smoothing: float
) -> FloatArray:
    """Return max(0, logit(e^s') - logit(p0)): how far above its frequency a model puts an n-gram.

    s' = min(s, -1) and p0 = (F + smoothing) / (T + smoothing). An n-gram that does not occur has no
    evidence.

    Args:
        logprobs: s, biases included.
        counts: F, how often each occurs.
        num_tokens: T, size of the text.
        smoothing: for rare n-grams.
    """
    logprobs = np.minimum(np.asarray(logprobs, np.float64), LARGEST_LOGPROB)
    base = np.log((np.asarray(counts) + smoothing) / (num_tokens + smoothing))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (logprobs - np.log1p(-np.exp(logprobs))) - (base - np.log1p(-np.exp(base)))
    return np.where((np.asarray(counts) > 0) & (gain > 0), gain, 0.0)


def ngram_weights(
    index: NgramIndex, ngrams: Sequence[FacetNgram], config: GroundingConfig
) -> FloatArray:
    """Return w(g) = evidence(s + b)^gamma of each n-gram.

    Raises:
        UserError: an n-gram without codes, or of a facet that settings or index do not have.
    """
    wrong = [g for g in ngrams if g.facet not in config.facets or not g.codes]
    if wrong:
        raise UserError(
            f"grounding: got an n-gram {wrong[0].codes} of facet {wrong[0].facet!r}, expected at "
            f"least one code of one of {', '.join(config.facets)}. Give every facet a section in "
            "the settings."
        )
    biased = [g.logprob + config.facets[g.facet].bias for g in ngrams]
    counts = np.array([index.find(g.facet, g.codes).count for g in ngrams], np.int64)
    gain = evidence(np.array(biased), counts, index.num_tokens, smoothing=config.smoothing)
    return gain**config.gamma


def score_items(
    index: NgramIndex,
    ngrams: Sequence[FacetNgram],
    config: GroundingConfig,
    *,
    unigrams: Mapping[str, FloatArray] | None = None,
) -> FloatArray:
    """Return a score for each item, (N,) float64, from n-grams that were generated for one request.

    N-grams are taken from the heaviest to the lightest (ties: by facet and codes). In each item,
    one counts where it occurs on positions that no earlier one took: once per item, with its weight
    times 1 - discount * (share of its different codes that earlier ones covered). What is left over
    is backed up by single codes with their evidence, to the power of 1, discounted alike; codes
    that were generated as n-grams of length 1 are not counted again.

    Args:
        index: the catalogue's facet strings.
        ngrams: generated n-grams; of equal ones the most probable counts.
        config: settings.
        unigrams: per facet, log-probabilities (V,) of the codes that may come first.
    """
    best: dict[tuple[str, tuple[int, ...]], FacetNgram] = {}
    for ngram in ngrams:
        key = (ngram.facet, ngram.codes)
        if key not in best or ngram.logprob > best[key].logprob:
            best[key] = ngram
    chosen = [best[key] for key in sorted(best)]
    weights = ngram_weights(index, chosen, config)
    order = [place for place in np.argsort(-weights, kind="stable") if weights[place] > 0]
    used = {code for place in order for code in chosen[place].codes}
    cover = _Cover(index, used, config.discount)
    for place in order:
        cover.add(chosen[place], float(weights[place]))
    singles = {g.codes[0] for g in chosen if len(g.codes) == 1}
    for facet, logprobs in (unigrams or {}).items():
        cover.back_up(facet, _unigram_evidence(index, facet, logprobs, singles, config))
    return cover.scores


def _unigram_evidence(
    index: NgramIndex, facet: str, logprobs: FloatArray, singles: set[int], config: GroundingConfig
) -> FloatArray:
    """Return the evidence of each code of a facet, (V,), 0 for all but the most probable ones."""
    codes, spans = index.children(index.root(facet))
    order = np.argsort(-logprobs[codes], kind="stable")[: config.num_unigrams]
    counts = np.array([spans[place].count for place in order], np.int64)
    found = np.zeros(index.num_codes)
    found[codes[order]] = evidence(
        logprobs[codes[order]], counts, index.num_tokens, smoothing=config.smoothing
    )
    found[index.marker(facet)] = 0.0
    found[[code for code in singles if code < len(found)]] = 0.0
    return found


class _Cover:
    """What was matched so far: taken positions, covered codes of each item, and scores."""

    def __init__(self, index: NgramIndex, codes: set[int], discount: float) -> None:
        self.index, self.discount = index, discount
        self.scores = np.zeros(index.num_items)
        self.free_S = np.ones(len(index.text_S), bool)
        self.columns = np.full(index.num_codes, -1, np.int64)
        self.columns[sorted(codes)] = np.arange(len(codes))
        self.covered = np.zeros((index.num_items, len(codes)), bool)

    def add(self, ngram: FacetNgram, weight: float) -> None:
        """Match an n-gram in all items at once."""
        span = self.index.find(ngram.facet, ngram.codes)
        places_Pn = self.index.positions(span)[:, None] + np.arange(span.length)
        places_Pn = places_Pn[self.free_S[places_Pn].all(axis=1)]
        places_Pn = places_Pn[_apart(places_Pn[:, 0], span.length)]
        self.free_S[places_Pn] = False
        rows = np.unique(self.index.rows_S[places_Pn[:, 0]])
        columns = self.columns[sorted(set(ngram.codes))]
        share = self.covered[np.ix_(rows, columns)].mean(axis=1)
        self.scores[rows] += weight * (1.0 - self.discount * share)
        self.covered[np.ix_(rows, columns)] = True

    def back_up(self, facet: str, evidence_V: FloatArray) -> None:
        """Add single codes on free positions, each different one once per item."""
        text_S, rows_S = self.index.text_S, self.index.rows_S
        places = self.index.positions(self.index.root(facet))
        places = places[self.free_S[places] & (evidence_V[text_S[places]] > 0)]
        pairs = np.unique(rows_S[places] * self.index.num_codes + text_S[places])
        rows, codes = np.divmod(pairs, self.index.num_codes)
        columns = self.columns[codes]
        known = np.flatnonzero(columns >= 0)
        share = np.zeros(len(rows))
        share[known] = self.covered[rows[known], columns[known]]
        gain = evidence_V[codes] * (1.0 - self.discount * share)
        self.scores += np.bincount(rows, weights=gain, minlength=len(self.scores))


def _apart(starts: IntArray, length: int) -> IntArray:
    """Return which occurrences to keep so that none overlap, from left to right; starts rise."""
    keep = np.ones(len(starts), bool)
    if length > 1 and (np.diff(starts) < length).any():
        last = -length
        for place, start in enumerate(starts.tolist()):
            keep[place] = start >= last + length
            last = start if keep[place] else last
    return keep


def rank_items(scores_BN: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Return the k best rows (B, k) int64 and their scores; ties by row, -1 where nothing speaks.

    An item that no n-gram points to (score 0) is not recommended.
    """
    if k < 1:
        raise UserError(f"k: got {k}, expected an integer >= 1. Set e.g. k=10.")
    rows = np.full((len(scores_BN), k), NO_ROW, np.int64)
    scores = np.zeros(rows.shape)
    for request, values in enumerate(scores_BN):
        found = np.flatnonzero(values > 0)
        best = found[np.lexsort((found, -values[found]))[:k]]
        rows[request, : len(best)], scores[request, : len(best)] = best, values[best]
    return rows, scores


def ground(
    model: StepModel,
    batches: Mapping[str, Any],
    index: NgramIndex,
    config: GroundingConfig,
    *,
    k: int,
) -> tuple[IntArray, FloatArray]:
    """Generate n-grams of every facet and return the items that they point to.

    Args:
        model: a StepModel whose codes are those of the index, in eval mode.
        batches: per facet, the same B requests as the model wants to read them for that facet (a
            model that was taught by instructions gets another one for each).
        index: the catalogue's facet strings.
        config: settings; a facet of the settings that has no batch is not generated.
        k: list length.

    Returns:
        rows (B, k) int64 ordered by (score descending, row ascending), -1 where nothing speaks for
        another item; and their scores (B, k) float64, 0 where padded.

    Raises:
        UserError: no facet to generate, or batches that are not of the same requests.
    """
    names = [name for name in config.facets if name in batches]
    if not names:
        raise UserError(
            f"grounding: got batches for {', '.join(batches) or 'no facet'}, expected some of "
            f"{', '.join(config.facets)}."
        )
    made = {
        name: generate_ngrams(model, batches[name], index, name, config.facets[name])
        for name in names
    }
    counts = {name: len(found.ngrams) for name, found in made.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"grounding: got {counts} requests, expected the same for every facet.")
    backed_up = [name for name in names if not config.facets[name].whole and config.num_unigrams]
    scores = [
        score_items(
            index,
            [ngram for found in made.values() for ngram in found.ngrams[request]],
            config,
            unigrams={name: made[name].first_BV[request] for name in backed_up},
        )
        for request in range(counts[names[0]])
    ]
    return rank_items(np.array(scores).reshape(-1, index.num_items), k)
