"""ActionPiece: an item is a set of features, and features that go together become one token
(Hou et al. 2025, 2502.13581).

It encodes items and whole histories. What the features are is in `feature_sets.py`, how the
vocabulary grows in `merging.py`; which model reads the tokens is decided elsewhere.

Shapes: N fitted items, M encoded items, L levels, F features of an item, H history items, V
vocabulary, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator

from genrec.config import StrictConfig
from genrec.errors import UserError
from genrec.item_index import END
from genrec.runtime import get_logger
from genrec.tokenizers.base import FloatArray, IntArray, ItemTokenizer, not_fitted
from genrec.tokenizers.fixed import training_interactions
from genrec.tokenizers.parts import complete_part, load_part, make_part, part_state
from genrec.tokenizers.pieces.feature_sets import FeatureSets
from genrec.tokenizers.pieces.merging import PairCounts, learn_merges
from genrec.tokenizers.pieces.segmenting import merge_sequence, merge_set

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)

QUANTIZER = "tokenizer.quantizer"


class ActionPiece(ItemTokenizer):
    """Feature sets merged into tokens of one shared vocabulary, by weighted pair counts.

    Token 0 is `END`; then come the features: the codes of each level of the quantizer, the values
    of each attribute, the buckets; then the merges in the order in which they were learned. The
    semantic ID of an item is the canonical encoding of its set alone.

    Args:
        config: see `ActionPiece.Config`.
    """

    class Config(StrictConfig):
        """Settings of ActionPiece."""

        name: Literal["action_piece"] = "action_piece"
        """Name in the registry."""
        quantizer: dict[str, Any] = Field(
            default={"name": "opq", "num_levels": 4, "codebook_size": 256}, validate_default=True
        )
        """Section of the tokenizer whose codes are features (the paper: OPQ, 4 codes of 256)."""
        attributes: tuple[str, ...] = ()
        """Columns of the catalogue whose values are features too (the paper: none besides text)."""
        max_values: int = Field(default=3, ge=1)
        """Values of an attribute that an item keeps, the first ones."""
        num_buckets: int = Field(default=128, ge=0)
        """Values of a last feature that tells items with equal features apart (the paper: 64 to
        256 by data set); 0: no such feature."""
        vocabulary_size: int = Field(default=4096, ge=2)
        """Tokens to grow to, `END` and features included (the paper: 40,000)."""
        seed: int = Field(default=0, ge=0)
        """Moves the quantizer's seed; merging draws nothing at random."""

        @field_validator("quantizer", mode="before")
        @classmethod
        def _complete(cls, section: Any) -> Any:
            return complete_part(section, default="opq")

    config: ActionPiece.Config
    shared_vocabulary: ClassVar[bool] = True

    def __init__(self, config: ActionPiece.Config) -> None:
        super().__init__(config)
        self._quantizer = self._new_quantizer()
        self._features: FeatureSets | None = None
        self._merges: list[tuple[int, int]] = []

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the quantizer needs, interactions, and texts if attributes are features."""
        texts = {"texts"} if self.config.attributes else set()
        return self._quantizer.needs | {"interactions"} | texts

    @property
    def codes_new_items(self) -> bool:  # type: ignore[override]
        """Whether the quantizer does."""
        return self._quantizer.codes_new_items

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether the quantizer does."""
        return self._quantizer.decodes

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Fit the quantizer, number the features, and grow the vocabulary.

        The corpus is the training sequences. It stops early, with a log line, when no pair is left.

        Raises:
            UserError: no training interactions, `vocabulary_size` does not even hold the features,
                or what the quantizer raises.
            DataError: no column of the name of an attribute.
        """
        config = self.config
        training = training_interactions(interactions, catalog, name=self.name)
        quantizer = self._new_quantizer().fit(catalog, training)
        codes = quantizer.encode(catalog)
        features = FeatureSets.of(
            codes,
            quantizer.codebook_sizes,
            catalog,
            attributes=config.attributes,
            max_values=config.max_values,
            num_buckets=config.num_buckets,
        )
        num_merges = config.vocabulary_size - features.end
        if num_merges < 0:
            raise UserError(
                f"tokenizer.vocabulary_size: got {config.vocabulary_size}, but the features alone "
                f"are {features.end} tokens. Set it to {features.end} (no merges) or more."
            )
        sets = [row[row != END].tolist() for row in features.encode(codes, catalog)]
        corpus = PairCounts(_sequences(sets, training), config.vocabulary_size)
        before = corpus.num_tokens()
        merges = learn_merges(corpus, features.end, num_merges)
        log.info(
            "ActionPiece: %d features, %d merges; the corpus went from %d to %d tokens%s.",
            features.end - 1, len(merges), before, corpus.num_tokens(),
            "" if len(merges) == num_merges else " (no pair is left)",
        )  # fmt: skip
        self._quantizer, self._features, self._merges = quantizer, features, merges
        return self

    def _new_quantizer(self) -> ItemTokenizer:
        return make_part(self.config.quantizer, path=QUANTIZER, seed=self.config.seed)

    def encode(self, catalog: Catalog) -> IntArray:
        """Return the canonical codes (M, L) int32, `END` after the last one.

        Merges are applied to an item's set alone, the earliest learned first; the token of the
        latest comes first. `decode_tokens` turns them back into exactly the item's features.
        """
        features, ranks = self._require_fitted(), self._ranks()
        sets = features.encode(self._quantizer.encode(catalog), catalog)
        codes = np.full(sets.shape, END, np.int32)
        for row, tokens in enumerate(sets):
            merged = merge_set(tokens[tokens != END].tolist(), ranks)
            codes[row, : len(merged)] = merged
        return codes

    def features(self, catalog: Catalog) -> IntArray:
        """Return the features of items as tokens, (M, F) int32, 0 where an item has fewer."""
        return self._require_fitted().encode(self._quantizer.encode(catalog), catalog)

    def segment(self, features_HF: IntArray, rng: np.random.Generator) -> list[int]:
        """Return a history as tokens, in context (set permutation regularisation, section 3.3).

        Each set is shuffled; then merges are applied to neighbouring tokens, across the borders of
        items too, the earliest learned first. A new draw of `rng` is another segmentation of the
        same history: training takes a new one each epoch, inference averages over several
        (`genrec.decoding.ensemble`).

        Args:
            features_HF: `features` of the history's items, oldest first.
            rng: shuffles.
        """
        self._require_fitted()
        flat: list[int] = []
        for tokens in np.asarray(features_HF):
            flat += rng.permutation(tokens[tokens != END]).tolist()
        return merge_sequence(flat, self._ranks())

    def decode_tokens(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the features that each token stands for; `END` stands for none.

        Raises:
            UserError: a token outside the vocabulary.
        """
        features = self._require_fitted()
        vocabulary = features.end + len(self._merges)
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if wrong:
            raise UserError(
                f"{self.name}: got token {wrong[0]}, expected 0 <= token < {vocabulary}. Take "
                "tokens from encode or segment of this tokenizer."
            )
        return [self._expand(int(token), features.end) for token in tokens]

    def _expand(self, token: int, first_merge: int) -> tuple[int, ...]:
        found: list[int] = []
        waiting = [token] if token != END else []
        while waiting:
            part = waiting.pop()
            if part < first_merge:
                found.append(part)
            else:
                waiting += reversed(self._merges[part - first_merge])
        return tuple(found)

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return the vectors (M, E) that the quantizer's codes among the features stand for.

        Codes beyond the vocabulary are numbers of colliding items and stand for nothing.

        Raises:
            UserError: a row that does not hold exactly one code of each level of the quantizer.
        """
        features = self._require_fitted()
        vocabulary = features.end + len(self._merges)
        codes = np.empty((len(codes_ML), len(features.level_firsts) - 1), np.int64)
        for row, tokens in enumerate(np.asarray(codes_ML)):
            parts = self.decode_tokens(tokens[tokens < vocabulary].tolist())
            found = sorted(f for part in parts for f in part if f < features.level_firsts[-1])
            levels = np.searchsorted(features.level_firsts, found, side="right") - 1
            if not np.array_equal(levels, np.arange(codes.shape[1])):
                raise UserError(
                    f"{self.name}: the codes {tokens.tolist()} are no item: expected one code of "
                    f"each of the {codes.shape[1]} levels of {self._quantizer.name}."
                )
            codes[row] = np.array(found) - features.level_firsts[:-1]
        return self._quantizer.decode(codes)

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors (M, E) that the quantizer quantises."""
        return self._quantizer.inputs(catalog)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The vocabulary, once for every feature that an item can have."""
        features = self._require_fitted()
        return (features.end + len(self._merges),) * features.width

    def _ranks(self) -> dict[tuple[int, int], int]:
        first = self._require_fitted().end
        return {pair: first + rank for rank, pair in enumerate(self._merges)}

    def state(self) -> dict[str, np.ndarray]:
        """Return the quantizer's arrays, the features and `merges` (R, 2) in learned order."""
        features = self._require_fitted()
        return {
            **part_state(self._quantizer, "quantizer"),
            **features.state(),
            "merges": np.array(self._merges, np.int32).reshape(-1, 2),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        load_part(self._quantizer, state, "quantizer")
        self._features = FeatureSets.from_state(
            state,
            self._quantizer.codebook_sizes,
            attributes=self.config.attributes,
            num_buckets=self.config.num_buckets,
        )
        self._merges = [(int(a), int(b)) for a, b in state["merges"]]
        return self

    def _require_fitted(self) -> FeatureSets:
        if self._features is None:
            raise not_fitted("ActionPiece")
        return self._features


def _sequences(sets: list[list[int]], interactions: Interactions) -> list[list[list[int]]]:
    users = (interactions.user(user) for user in range(interactions.num_users))
    return [[sets[row] for row in rows.tolist()] for rows in users]
