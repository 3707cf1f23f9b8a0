"""Which n-grams of the catalogue does a model find most probable? A beam without fixed positions.

It generates nothing that no item has. The strings come from `NgramIndex`, networks are met through
`StepModel` only; what the n-grams say about items is decided in `grounding.py`.

Shapes: B requests, W beams of a request, R = B*W rows, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from genrec.config import StrictConfig
from genrec.decoding.ngrams import NgramIndex, Span
from genrec.decoding.protocol import StepModel
from genrec.errors import UserError

FloatArray = np.ndarray


class FacetRules(StrictConfig):
    """How one facet is generated and weighed."""

    bias: float = 0.0
    """b, added to log-probabilities (the paper: 9 to 12 for ids, 5 to 6 for attributes, 0 for
    titles; tune on validation data)."""
    whole: bool = False
    """True: a string of the facet from its beginning to its end. False: any part of one, so that a
    title may be recognised by its middle."""
    width: int = Field(default=15, ge=1)
    """Beam width (the paper: 15 to 20)."""
    max_length: int = Field(default=10, ge=1)
    """Codes of an n-gram at most, marker not counted (the paper: 10; 15 for attributes)."""


@dataclass(frozen=True)
class FacetNgram:
    """A generated n-gram.

    Args:
        facet: name of the facet that it belongs to.
        codes: its codes; the marker is among them where the n-gram begins a string.
        logprob: natural log-probability that the model gave it.
    """

    facet: str
    codes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class Generated:
    """What was generated for one facet.

    Args:
        ngrams: per request, n-grams, shorter ones first, more probable ones first.
        first_BV: log-probabilities of the code after the marker.
    """

    ngrams: list[list[FacetNgram]]
    first_BV: FloatArray


@dataclass(frozen=True)
class _Beam:
    codes: tuple[int, ...]
    span: Span
    logprob: float
    row: int  # of the model's last call


@torch.no_grad()
def generate_ngrams(
    model: StepModel, batch: Any, index: NgramIndex, facet: str, rules: FacetRules
) -> Generated:
    """Generate the most probable n-grams of a facet; all of them occur in the catalogue.

    The facet's marker is put behind the history; then a beam of `rules.width` n-grams grows code by
    code, among the codes that may follow. Every n-gram that was in a beam is returned; with
    `whole`, those that reach the end of a string. Log-probabilities are over all V codes.

    Args:
        model: its codes are those of the index, from the first level on.
        batch: B requests, whatever `model.begin` reads.
        index: the catalogue's facet strings.
        facet: which one.
        rules: how.

    Raises:
        UserError: no such facet, or a model with fewer codes than the index.
    """
    marker, root = index.marker(facet), index.root(facet)
    logits, state = model.begin(batch)
    num_requests, device = len(logits), logits.device
    if logits.shape[1] < index.num_codes:
        raise UserError(
            f"grounding: the model has {logits.shape[1]} codes, the strings use {index.num_codes}. "
            "Build the n-gram index from the tokenizer that the model was trained with."
        )
    requests = torch.arange(num_requests, device=device)
    logits, state = model.step(torch.full_like(requests, marker), state, requests)
    logprobs = first_BV = _logprobs(logits)
    start, prefix = (index.extend(root, marker), (marker,)) if rules.whole else (root, ())
    beams = [[_Beam(prefix, start, 0.0, request)] for request in range(num_requests)]
    found: list[list[FacetNgram]] = [[] for _ in beams]
    for length in range(1, rules.max_length + 1):
        beams = [_grow(index, own, logprobs, marker, rules.width) for own in beams]
        for ngrams, own in zip(found, beams, strict=True):
            ngrams += [
                FacetNgram(facet, beam.codes, beam.logprob)
                for beam in own
                if not rules.whole or index.ends(beam.span)
            ]
        if length == rules.max_length or not any(beams):
            break
        codes, parents = _to_run(beams, marker, len(logprobs) // num_requests)
        logits, state = model.step(codes.to(device), state, parents.to(device))
        logprobs = _logprobs(logits)
        beams = _placed(beams, len(logprobs) // num_requests)
    return Generated(found, first_BV)


def _grow(
    index: NgramIndex, beams: list[_Beam], logprobs_RV: FloatArray, marker: int, width: int
) -> list[_Beam]:
    """Return the best extensions of one request's beams; ties by the parents' order, then code."""
    parents: list[_Beam] = []
    codes: list[int] = []
    spans: list[Span] = []
    scores: list[FloatArray] = []
    for beam in beams:
        allowed, children = index.children(beam.span)
        parents += [beam] * len(children)
        codes += allowed.tolist()
        spans += children
        gained = beam.logprob + logprobs_RV[beam.row, allowed]
        scores.append(np.where(allowed == marker, -np.inf, gained))
    if not codes:
        return []
    joined = np.concatenate(scores)
    best = [
        place for place in np.argsort(-joined, kind="stable")[:width] if joined[place] > -np.inf
    ]
    return [
        _Beam((*parents[p].codes, codes[p]), spans[p], float(joined[p]), parents[p].row)
        for p in best
    ]


def _to_run(beams: list[list[_Beam]], filler: int, width_before: int) -> tuple[Tensor, Tensor]:
    """Return codes and parents (R,) for the model, every request with as many rows as the widest.

    A request with fewer beams gets rows that nobody reads.
    """
    width = max(map(len, beams))
    codes = torch.full((len(beams), width), filler, dtype=torch.int64)
    parents = (torch.arange(len(beams)) * width_before)[:, None].repeat(1, width)
    for request, own in enumerate(beams):
        for place, beam in enumerate(own):
            codes[request, place], parents[request, place] = beam.codes[-1], beam.row
    return codes.reshape(-1), parents.reshape(-1)


def _placed(beams: list[list[_Beam]], width: int) -> list[list[_Beam]]:
    """Return the beams with the rows that they have in the model's last call."""
    return [
        [replace(beam, row=request * width + place) for place, beam in enumerate(own)]
        for request, own in enumerate(beams)
    ]


def _logprobs(logits_RV: Tensor) -> FloatArray:
    result: FloatArray = torch.log_softmax(logits_RV.double(), dim=-1).cpu().numpy()
    return result
