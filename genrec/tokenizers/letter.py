"""LETTER: RQ-VAE codes that also follow who consumes an item, with code vectors kept apart.

Wang et al. 2024. Training is the RQ-VAE's with two more terms (`letter_training.py`). Generation is
not its business: the ranking-guided loss is a setting of the model.

Shapes: N fitted items, L levels, K codes, D latent width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from genrec.errors import UserError
from genrec.features.collaborative import CollaborativeConfig, collaborative_vectors
from genrec.tokenizers.base import IntArray
from genrec.tokenizers.quantization.letter_training import LetterObjective
from genrec.tokenizers.quantization.rqvae_training import Network, Objective
from genrec.tokenizers.rqvae import RQVAE

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions


class LETTER(RQVAE):
    """RQ-VAE with collaborative alignment and diverse code vectors.

    Args:
        config: see `LETTER.Config`.
    """

    class Config(RQVAE.Config):
        """Settings of LETTER: those of the RQ-VAE, with other defaults, and its own."""

        name: Literal["letter"] = "letter"  # type: ignore[assignment]
        """Name in the registry."""
        num_levels: int = Field(default=4, ge=1)
        """Number of codes of an item, L (LETTER: 4)."""
        hidden_dims: tuple[int, ...] = (512, 256, 128)
        """Widths of the encoder's hidden layers; the decoder mirrors them (TIGER; LETTER's
        2048-1024-512-256-128-64 takes ten times as long)."""
        last_level: Literal["nearest", "sinkhorn"] = "sinkhorn"
        """How the last level assigns during training; "sinkhorn" spreads each batch evenly
        (LETTER). `encode` always takes the nearest code."""
        alpha: float = Field(default=0.02, ge=0)
        """Weight of the collaborative alignment (LETTER: 0.01 to 0.1); 0 needs no interactions."""
        beta: float = Field(default=1e-4, ge=0)
        """Weight of the diversity loss (LETTER: 1e-4); needs codebook_update: gradient."""
        num_groups: int = Field(default=10, ge=1)
        """Groups of code vectors per level for the diversity loss (LETTER: 10); fewer when there
        are not two codes for each."""
        constrained_init: bool = True
        """With `kmeans_init`: first clusters of at least min(10, N / (2 K)) items (LETTER)."""
        collaborative: CollaborativeConfig = CollaborativeConfig(width=32)
        """How the collaborative vectors are made; `width` is replaced by `latent_dim`, and `seed`
        is added to the tokenizer's."""

        @model_validator(mode="after")
        def _diversity_needs_gradients(self) -> Self:
            if self.beta > 0 and self.codebook_update == "ema":
                raise ValueError(
                    "the diversity loss (beta > 0) moves code vectors by gradients; set "
                    "codebook_update=gradient or beta=0"
                )
            return self

    config: LETTER.Config
    needs: ClassVar[frozenset[str]] = frozenset({"vectors", "interactions"})
    objective: ClassVar[type[Objective]] = LetterObjective

    def _objective(
        self,
        network: Network,
        catalog: Catalog,
        interactions: Interactions | None,
        order_N: IntArray,
    ) -> Objective:
        targets_ND = np.zeros((len(catalog), self.config.latent_dim), np.float32)
        if self.config.alpha > 0:
            targets_ND = _collaborative(self.config, catalog, interactions)
        return LetterObjective(network, self.config, targets_ND[order_N])


def _collaborative(
    config: LETTER.Config, catalog: Catalog, interactions: Interactions | None
) -> np.ndarray:
    """Return collaborative vectors (N, D) float32 of all items."""
    if interactions is None:
        raise UserError(
            "tokenizer.letter: needs the training interactions. Pass "
            "fit(catalog, interactions.training()), or set tokenizer.alpha=0."
        )
    if interactions.num_items != len(catalog):
        raise UserError(
            f"tokenizer.letter: the interactions are of {interactions.num_items} items, the "
            f"catalogue has {len(catalog)}. Use the two of one data set."
        )
    settings = config.collaborative.model_copy(
        update={"width": config.latent_dim, "seed": config.collaborative.seed + config.seed}
    )
    return collaborative_vectors(interactions, settings)
