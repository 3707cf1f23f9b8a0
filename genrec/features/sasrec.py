"""SASRec: which item comes next, by a causal transformer over item ids, and its item vectors.

Kang and McAuley (2018), with a choice of losses. It sees item rows only: no texts, no splits. The
network is in `sasrec_network.py`, the loop in `sasrec_training.py`; this file loads no torch.

Shapes: B histories, N items, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from genrec.data.history_length import HistoryConfig
from genrec.errors import TrainingError, UserError

if TYPE_CHECKING:
    from genrec.data.interactions import Examples, Interactions

MIN_TO_HOLD_OUT = 3


class SASRecConfig(HistoryConfig):
    """Settings of SASRec and its training (`max_history` in the paper: 50, MovieLens 200)."""

    d_model: int = Field(default=64, ge=1)
    """Width D of item embeddings and hidden states."""
    num_layers: int = Field(default=2, ge=1)
    """Transformer blocks (paper: 2)."""
    num_heads: int = Field(default=2, ge=1)
    """Attention heads; must divide d_model (paper: 1)."""
    d_ff: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layers; default d_model, as in the paper."""
    pre_norm: bool = False
    """Normalise after each sub-layer (false), which was as good on MovieLens-100K in fewer epochs,
    or before it (true)."""
    dropout: float = Field(default=0.4, ge=0, lt=1)
    """Dropout on embeddings and after both sub-layers (paper: 0.2 to 0.5)."""
    loss: Literal["softmax", "sampled_softmax", "bce"] = "softmax"
    """softmax: cross-entropy over all items. sampled_softmax: over the target, the items of the
    history and `num_negatives` random ones. bce: binary cross-entropy with `num_negatives` (paper:
    1)."""
    num_negatives: int | None = Field(default=None, ge=1)
    """sampled_softmax: random items shared by a batch, default 512. bce: random items per target,
    default 1 (paper)."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """null: a score is the dot product of hidden state and item embedding (paper). A number: their
    cosine divided by it (0.05 in the SASRec of Zhai et al. 2024, 2402.17152)."""
    repeat_bias: bool = False
    """Learn how much more or less likely an item becomes by standing in the history, by how long
    ago (the paper's model has nothing of the kind). Not for bce."""
    epochs: int = Field(default=100, ge=1)
    """Most passes over the training sequences."""
    batch_targets: int = Field(default=1024, ge=1)
    """Target places per step: sequences of like length are put together up to this number."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """AdamW's learning rate (paper: 1e-3 with Adam)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Above 0: the weights that are validated and kept are an exponential moving average over the
    steps with this decay, e.g. 0.998. 0: the weights themselves (paper)."""
    patience: int = Field(default=6, ge=1)
    """Stop after this many epochs without a better validation NDCG@10."""
    validation_users: int = Field(default=5000, ge=1)
    """Most users that early stopping looks at."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order, dropout and negatives."""

    @property
    def negatives(self) -> int:
        """Number of negatives that the loss draws."""
        return self.num_negatives or (1 if self.loss == "bce" else 512)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.repeat_bias and self.loss == "bce":
            raise ValueError("repeat_bias needs the loss softmax or sampled_softmax, got bce")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model={self.d_model} is no multiple of num_heads={self.num_heads}")
        return self


class SASRec:
    """Fits on training interactions, scores histories and gives one vector per item.

    Args:
        config: see `SASRecConfig`.
    """

    def __init__(self, config: SASRecConfig | None = None) -> None:
        self.config = self._asked = config or SASRecConfig()
        self.history: list[dict[str, float]] = []
        """One line per epoch: epoch, loss, ndcg@10, recall@10 on the validation users."""
        self._network: Any = None
        self._popularity_N = np.empty(0)

    def fit(self, interactions: Interactions, validation: Examples | None = None) -> Self:
        """Train until the validation NDCG@10 stops rising, and keep the best epoch.

        Args:
            interactions: `interactions.training()` of a data set.
            validation: `interactions.examples("valid")`. Without it, the last training interaction
                of up to `validation_users` users with at least three decides, and is not trained
                on.

        Raises:
            TrainingError: no user has two training interactions, or the loss became NaN.
        """
        from genrec.features import sasrec_training as training

        config = self.config = self._asked.for_histories(interactions)
        chosen, sequences = _held_out(interactions, validation, config)
        if not sequences.num_targets:
            raise TrainingError(
                "sasrec: no user has two training interactions, so nothing follows anything. "
                "Expected longer histories."
            )
        self._popularity_N = np.log1p(interactions.counts())
        with training.seeded(config.seed):
            self._network = training.build(interactions.num_items, config)
            self.history = training.train(self._network, sequences, config, chosen)
        return self

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Return logits (B, N) float64 of the next item.

        An empty history is answered by popularity in training.

        Args:
            histories: B arrays of item rows, oldest first.

        Raises:
            UserError: not fitted.
        """
        from genrec.features import sasrec_training as training

        network = self._fitted()
        scores_BN = np.tile(self._popularity_N, (len(histories), 1))
        known = [b for b, history in enumerate(histories) if len(history)]
        if known:
            parts = training.score(network, [histories[b] for b in known])
            scores_BN[known] = np.concatenate([part.cpu().numpy() for part in parts])
        return scores_BN

    def item_vectors(self) -> np.ndarray:
        """Return the item embeddings (N, D) float32; of length 1 where scores are cosines."""
        vectors: np.ndarray = self._fitted().item_outputs().detach().cpu().numpy().copy()
        return vectors

    def _fitted(self) -> Any:
        if self._network is None:
            raise UserError("sasrec: not fitted. Call fit(interactions.training()) first.")
        return self._network


def _held_out(
    interactions: Interactions, validation: Examples | None, config: SASRecConfig
) -> tuple[Any, Any]:
    """Return validation (histories, targets) or None, and the sequences left to train on."""
    from genrec.features.sasrec_training import Sequences

    starts, stops = interactions.offsets[:-1].copy(), interactions.offsets[1:].copy()
    flat = interactions.item_rows.astype(np.int64)
    users = np.flatnonzero(stops - starts >= MIN_TO_HOLD_OUT)
    chosen: Any = None
    if validation is not None:
        places = _spread(np.flatnonzero(validation.lengths > 0), config.validation_users)
        if len(places):
            histories = [validation.history(int(i)) for i in places]
            chosen = (histories, validation.target_rows[places])
    elif len(users):
        users = _spread(users, config.validation_users)
        stops[users] -= 1
        chosen = ([flat[starts[u] : stops[u]] for u in users], flat[stops[users]])
    long = np.flatnonzero(stops - starts >= 2)
    kept = [flat[starts[u] : stops[u]] for u in long]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in kept])]).astype(np.int64)
    return chosen, Sequences(np.concatenate(kept) if kept else flat[:0], offsets)


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the values, evenly spread."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).astype(np.int64)]
