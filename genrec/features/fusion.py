"""Fusion: several sources of vectors (text, image, collaborative, files) as one vector per item.

Each part is an extractor with its own configuration. A zero row of a part means that this item
lacks that modality. How parts are made is their own business; the arithmetic is in `fusing.py`.

Shapes: N items, E_p width of part p, E width of the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from genrec.config import StrictConfig, parse_component
from genrec.errors import DataError, UserError
from genrec.features import FEATURES
from genrec.features.base import ALONE, Block, FeatureExtractor, Workplace, finished
from genrec.features.fusing import (
    Scale,
    agreement_weights,
    concatenate,
    imputed,
    present,
    principal_components,
    weighted_sum,
)
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genrec.data import Catalog, Interactions

log = get_logger(__name__)


def _alone(part: FeatureExtractor) -> bool:
    return part.embeds_alone and part.embeds_later


class Fusion(FeatureExtractor):
    """Vectors of several extractors, combined.

    Args:
        config: see `Fusion.Config`.
    """

    class Config(StrictConfig):
        """Settings of the fusion."""

        name: Literal["fusion"] = "fusion"
        """Name in the registry."""
        parts: tuple[str | dict[str, Any], ...] = Field(min_length=1)
        """Extractors, each a name or a section with `name` and its settings."""
        combine: Literal["concatenate", "pca", "weighted_sum"] = "concatenate"
        """concatenate: one after the other. pca: principal components of that. weighted_sum: each
        part's principal components, rotated onto the first part's (Procrustes), averaged."""
        scaling: Literal["center", "standardize", "none"] = "center"
        """Before combining, per part and over the items that have it: subtract the mean (center),
        also divide by the standard deviation of each dimension (standardize), and scale rows to
        length 1; or leave the vectors as they are (none)."""
        weights: Literal["cooccurrence", "equal"] | tuple[float, ...] = "cooccurrence"
        """Share of each part in squared distances. cooccurrence: by how much more often a part's
        nearest neighbours occur together in training than chance, so that a part of noise gets
        nothing; equal weights would let it in."""
        missing: Literal["neighbours", "zero"] = "neighbours"
        """concatenate, pca: what an item has in place of a part that it lacks: the mean over its
        nearest neighbours in the parts that it has, or zeros with its other parts scaled up (such
        items then keep to themselves)."""
        width: int = Field(default=128, ge=1)
        """pca, weighted_sum: width E of the result; at most what the parts support."""
        normalize: bool = True
        """Scale the result to length 1; an item that lacks every part stays zero."""
        seed: int = Field(default=0, ge=0)
        """Seed of randomized decompositions and of the items sampled for the weights."""

        @field_validator("parts")
        @classmethod
        def _known(cls, parts: tuple[str | dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
            checked = [
                parse_component(FEATURES, part, path=str(number))[1].to_dict()
                for number, part in enumerate(parts)
            ]
            return tuple(checked)

        @field_validator("weights")
        @classmethod
        def _shares(cls, weights: Any) -> Any:
            if not isinstance(weights, str) and (min(weights, default=0) < 0 or not sum(weights)):
                raise ValueError("expected numbers >= 0, at least one of them above 0")
            return weights

    config: Fusion.Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        found = [parse_component(FEATURES, part, path="parts") for part in config.parts]
        self.parts = [cls(part) for cls, part in found]
        self.needs_interactions = config.weights == "cooccurrence" or any(
            part.needs_interactions for part in self.parts
        )
        self._fitted: dict[str, np.ndarray] = {}
        self.shares_work = any(part.shares_work for part in self.parts)
        self.embeds_alone = (
            (config.combine, config.scaling, config.missing) == ("concatenate", "none", "zero")
            and config.weights != "cooccurrence"
            and all(part.embeds_alone for part in self.parts)
        )
        if isinstance(config.weights, tuple) and len(config.weights) != len(self.parts):
            raise UserError(
                f"features.weights: got {len(config.weights)} numbers for {len(self.parts)} parts. "
                "Expected one per part, or 'equal' or 'cooccurrence'."
            )

    def for_catalog(self, catalog: Catalog) -> FeatureExtractor:
        """Return a fusion without `auto` where no item has a text and another part remains."""
        suited = [part.for_catalog(catalog) for part in self.parts]
        fits = [after is before for before, after in zip(self.parts, suited, strict=True)]
        if all(fits):
            return self
        if any(fits):
            log.warning("features.fusion: the part auto is left out, the others remain.")
            suited = [part for part, fit in zip(suited, fits, strict=True) if fit]
        else:
            fits = [True] * len(suited)
        changed: dict[str, Any] = {"parts": tuple(part.config.to_dict() for part in suited)}
        if isinstance(self.config.weights, tuple):
            shares = zip(self.config.weights, fits, strict=True)
            changed["weights"] = tuple(share for share, fit in shares if fit)
        return Fusion(Fusion.Config(**{**self.config.to_dict(), **changed}))

    def resolve(self) -> Fusion.Config:
        """Return the configuration with every part resolved; raises what the parts raise."""
        parts = tuple(part.resolve().to_dict() for part in self.parts)
        return self.config.model_copy(update={"parts": parts})

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return what the parts read beside the catalogue."""
        return {
            f"{number}: {what}": digest
            for number, part in enumerate(self.parts)
            for what, digest in part.reads(catalog).items()
        }

    def content_columns(self, width: int, blocks: Sequence[Block]) -> tuple[int, ...]:
        """Return the columns of parts that read no interactions; see `FeatureExtractor`.

        Parts that were mixed (pca, weighted_sum) cannot be told apart: all columns or none.
        """
        if not blocks:
            mixed = any(part.needs_interactions for part in self.parts)
            return () if mixed else tuple(range(width))
        return tuple(
            column
            for part, block in zip(self.parts, blocks, strict=True)
            if not part.needs_interactions
            for column in range(block.start, block.stop)
        )

    def embed(
        self,
        catalog: Catalog,
        interactions: Interactions | None = None,
        workplace: Workplace = ALONE,
    ) -> np.ndarray:
        """Return vectors (N, E) float32; an item that lacks every part gets the zero vector.

        Raises:
            UserError: no interactions although a part or the weights need them.
            DataError: a part has no vector at all.
        """
        if self.needs_interactions and interactions is None:
            raise UserError(
                "features.fusion: a part or weights=cooccurrence needs the training interactions. "
                "Pass embed(catalog, interactions.training())."
            )
        vectors = [part.embed(catalog, interactions, workplace) for part in self.parts]
        return self.join(catalog, vectors, interactions)

    def join(
        self,
        catalog: Catalog,
        vectors: Sequence[np.ndarray],
        interactions: Interactions | None = None,
    ) -> np.ndarray:
        """Return the vectors of the parts put together; see `FeatureExtractor`."""
        config = self.config
        names = [part.config.name for part in self.parts]
        for name, part in zip(names, vectors, strict=True):
            if not part.any():
                raise DataError(
                    f"features.fusion: part {name!r} has no vector for any of the {len(catalog)} "
                    "items. Leave this part out, or check its settings."
                )
        scales = [Scale.of(part, config.scaling) for part in vectors]
        ready = [scale.scaled(part) for scale, part in zip(scales, vectors, strict=True)]
        weights = self._weights(ready, interactions)
        self._keep(scales, ready, weights)
        log.info(
            "fusion: %s.",
            ", ".join(
                f"{name} ({part.shape[1]} wide, {part.any(axis=1).mean():.0%} of items, "
                f"weight {weight:.2f})"
                for name, part, weight in zip(names, ready, weights, strict=True)
            ),
        )
        return finished(
            self._combined(names, ready, weights), catalog.item_ids, normalize=config.normalize
        )

    # -- items that join later ------------------------------------------------------------------

    @property
    def embeds_later(self) -> bool:
        """Whether a part can, and the others can be filled in from the items that have them."""
        return self.config.combine == "concatenate" and any(map(_alone, self.parts))

    @property
    def _fits_nothing(self) -> bool:
        return self.embeds_alone and all(map(_alone, self.parts))

    def fitted(self) -> dict[str, np.ndarray]:
        """Return the parts' scales and weights, and which item had which part; {} if none of it."""
        return dict(self._fitted)

    def _keep(self, scales: list[Scale], ready: list[np.ndarray], weights: np.ndarray) -> None:
        self._fitted = {}
        if self._fits_nothing or not self.embeds_later:
            return
        self._fitted = {"weights": weights, "has": np.stack([present(p) for p in ready], axis=1)}
        for number, scale in enumerate(scales):
            self._fitted |= {f"mean_{number}": scale.mean, f"spread_{number}": scale.spread}

    def embed_later(
        self, catalog: Catalog, fitted: Mapping[str, np.ndarray], vectors_NE: np.ndarray | None
    ) -> np.ndarray:
        """Return vectors (M, E) of items that join later; see `FeatureExtractor`.

        Parts that know items by themselves embed them, scaled as the others were. What they lack is
        filled in from the items that have it, as for an item that lacked it from the start.

        Raises:
            UserError: nothing was fitted, or is at hand.
        """
        if self._fits_nothing:
            return self.embed(catalog)
        if not self.embeds_later or vectors_NE is None or "weights" not in fitted:
            raise UserError(
                "features.fusion: what it fitted when the other items were embedded is not at hand "
                "(or combine is not 'concatenate'), so items that join later cannot be embedded. "
                "Make vectors and index again, or give vectors of the new items."
            )
        weights, has_NP = fitted["weights"], fitted["has"]
        joined, start = [], 0
        for number, (part, weight) in enumerate(zip(self.parts, weights, strict=True)):
            scale = Scale(fitted[f"mean_{number}"], fitted[f"spread_{number}"], self.config.scaling)
            end = start + len(scale.mean)
            known = vectors_NE[:, start:end].astype(np.float64) * has_NP[:, [number]]
            known = known / np.sqrt(weight) if weight else known
            new = np.zeros((len(catalog), end - start))
            if _alone(part):
                new = scale.scaled(part.embed(catalog))
            joined.append(np.concatenate([known, new]))
            start = end
        filled = imputed(joined, weights) if self.config.missing == "neighbours" else joined
        found = concatenate([part[len(vectors_NE) :] for part in filled], weights)
        return finished(found, catalog.item_ids, normalize=self.config.normalize)

    # -- arithmetic -----------------------------------------------------------------------------

    def _weights(self, parts: list[np.ndarray], interactions: Interactions | None) -> np.ndarray:
        chosen = self.config.weights
        if chosen == "cooccurrence":
            assert interactions is not None
            return agreement_weights(parts, interactions, seed=self.config.seed)
        shares = np.ones(len(parts)) if chosen == "equal" else np.asarray(chosen, dtype=np.float64)
        return shares / shares.sum()

    def _combined(
        self, names: list[str], parts: list[np.ndarray], weights: np.ndarray
    ) -> np.ndarray:
        config = self.config
        if config.combine == "weighted_sum":
            return weighted_sum(parts, weights, config.width, seed=config.seed)
        filled = imputed(parts, weights) if config.missing == "neighbours" else parts
        joined = concatenate(filled, weights)
        if config.combine == "pca":
            return principal_components(joined, config.width, seed=config.seed)
        ends = np.cumsum([part.shape[1] for part in parts])
        self.blocks = tuple(
            Block(name, int(end) - part.shape[1], int(end))
            for name, part, end in zip(names, parts, ends, strict=True)
        )
        return joined
