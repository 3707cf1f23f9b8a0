"""Constrained decoding: from a model and the catalogue's tree to ranked items.

`beam_search` and `exact_search` find lists, `score_candidates` and `score_catalogue` score given
items; `CSRIndex` is the tree that they walk, `Trie` and `reference_beam_search` the readable twins.
Networks meet this room only through the `StepModel` protocol.
"""

from genrec.decoding.beam import beam_search
from genrec.decoding.boosts import Boosts
from genrec.decoding.csr import CSRIndex
from genrec.decoding.exact import (
    exact_search,
    invalid_mass,
    score_candidates,
    score_catalogue,
    score_levels,
)
from genrec.decoding.protocol import (
    Beams,
    Children,
    ConstraintIndex,
    Filters,
    Scoring,
    StepModel,
    VocabularyModel,
)
from genrec.decoding.trie import Trie, reference_beam_search

__all__ = [
    "Beams",
    "Boosts",
    "CSRIndex",
    "Children",
    "ConstraintIndex",
    "Filters",
    "Scoring",
    "StepModel",
    "Trie",
    "VocabularyModel",
    "beam_search",
    "exact_search",
    "invalid_mass",
    "reference_beam_search",
    "score_candidates",
    "score_catalogue",
    "score_levels",
]
