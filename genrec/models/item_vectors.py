"""What is an item as a vector? The sum of its codes' vectors, one of its own, and its content.

For backbones that read and score whole items. It knows neither histories nor losses.

Shapes: N items, L levels, E width of the features' vectors, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.artifacts import fingerprint
from genrec.errors import UserError
from genrec.item_index import ItemIndex
from genrec.models.content import Content
from genrec.models.hstu import ItemPositionsBackbone, ItemPositionsConfig
from genrec.runtime import get_logger

if TYPE_CHECKING:
    from genrec.data import Catalog

log = get_logger(__name__)


class ItemVectorsConfig(ItemPositionsConfig):
    """What an item's vector is made of, beside its codes."""

    item_vectors: bool = True
    """Give each item that training knows a learned vector of its own, added to those of its codes.
    Others have none: theirs would only learn that nobody chooses them."""
    item_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that a training step does without an item's own vector, in the history as
    among the candidates: items that are rare or new then rank by their codes."""
    consumed_only: bool = False
    """Train the choice of an item among those that someone consumed in training. The others are new
    rather than disliked: as negatives of every step they would learn to lose. How likely they are
    is learned from the validation targets instead, in one number (`genrec.models.new_items`)."""
    content: bool = False
    """Add a linear map, learned, of the vector that the item's features gave: items with like texts
    then help one another, rare and new ones most. Features made of interactions are left out: they
    know the training targets, so a model would lean on them and be wrong on new ones. Where no
    others are there, a model does without (and says so)."""
    content_half_at: float | None = Field(default=None, gt=0)
    """Training interactions after which an item keeps half of its content: with h, an item that was
    consumed n times keeps h / (h + n) of it, whoever training does not know all of it; what joins
    later keeps the mean over the training interactions. With `consumed_only` both keep the mean
    over the items that training knows. None: all of it, always. Without `content` it changes
    nothing."""

    @property
    def needs_vectors(self) -> bool:
        """Whether training reads the catalogue's vectors."""
        return self.content

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return the fingerprint of the catalogue's vectors, if the model takes them in."""
        if not self.content or catalog.content_vectors is None:
            return {}
        return {"vectors": fingerprint(catalog.content_vectors)}


class ItemVectorsBackbone(ItemPositionsBackbone):
    """A backbone from scratch with a vector per item; see the module's text."""

    config: ItemVectorsConfig
    item_tables: ClassVar[tuple[str, ...]] = (
        "own.weight",
        "consumed_N1",
        "content.vectors_NE",
        "content.share_N1",
    )
    own: nn.Embedding
    consumed_N1: Tensor
    content: Content | None

    def __init__(
        self,
        config: ItemVectorsConfig,
        tokens_NL: Tensor,
        codebook_sizes: Sequence[int],
        shared_vocabulary: bool = False,
    ) -> None:
        super().__init__(config, tokens_NL, codebook_sizes, shared_vocabulary)
        self._made_table: tuple[tuple[Any, ...], Tensor] | None = None
        if config.item_vectors:
            self.own = nn.Embedding(len(self.tokens_NL), config.d_model)
        if config.item_vectors or config.consumed_only:
            self.register_buffer("consumed_N1", torch.ones(len(self.tokens_NL), 1).bool())

    def facts(self) -> dict[str, Any]:
        """Return also the width of the item vectors that the model takes in, if any."""
        facts = super().facts()
        if self.config.content:
            content = self._content()
            facts["vector_width"] = 0 if content is None else content.vectors_NE.shape[1]
        return facts

    @classmethod
    def for_saved(
        cls, config: Any, index: ItemIndex, facts: Mapping[str, Any], *, base: str | None = None
    ) -> Self:
        """Build a backbone that saved weights are loaded into; see `Backbone.for_saved`."""
        model = super().for_saved(config, index, facts, base=base)
        if config.content:
            model._take_in(torch.zeros(len(index), facts["vector_width"]))
        return model

    def start_from(self, catalog: Catalog) -> None:
        """Take in the catalogue's vectors, where `content` says so.

        Raises:
            UserError: a catalogue without vectors, or another catalogue.
        """
        if not self.config.content:
            return
        found = "none" if catalog.vectors is None else str(len(catalog.vectors))
        if catalog.vectors is None or len(catalog.vectors) != len(self.tokens_NL):
            raise UserError(
                f"model.content: got {found} item vectors for an index of {len(self.tokens_NL)} "
                "items, expected one each. Give the catalogue vectors (`features`), or set "
                "model.content=false."
            )
        described_NE = catalog.content_vectors
        if described_NE is None:
            log.warning(
                "model.content: all item vectors were made of interactions, so there is no content "
                "and the model does without."
            )
            described_NE = np.zeros((len(self.tokens_NL), 0))
        self._take_in(torch.from_numpy(np.asarray(described_NE, dtype=np.float32)))

    def _take_in(self, vectors_NE: Tensor) -> None:
        config = self.config
        content = None
        if vectors_NE.shape[1]:
            content = Content(
                vectors_NE,
                config.d_model,
                config.init_std,
                half_at=config.content_half_at,
                new_as_rare=config.consumed_only,
            ).to(self.device)
        self.register_module("content", content)

    def meet_items(self, counts_N: np.ndarray, *, more: bool = False) -> None:
        """Take in how often items were consumed; see `Backbone.meet_items`."""
        config, found_N = self.config, torch.from_numpy(counts_N).to(self.device)
        if config.item_vectors or config.consumed_only:
            met_N1 = found_N[:, None] > 0
            self.consumed_N1.copy_(met_N1 | self.consumed_N1 if more else met_N1)
        if content := self._content():
            content.meet_items(found_N, more=more)

    @property
    def reads_content(self) -> bool:
        """Whether an item is also known by the vector that its features gave."""
        return self._content() is not None

    def describe(self, first: int, vectors_MC: np.ndarray) -> None:
        """Take in the content of items that join later; see `Backbone.describe`."""
        if content := self._content():
            content.describe(first, torch.from_numpy(vectors_MC))

    def item_representations(self, rows: Tensor) -> Tensor:
        """Return the items' vectors; see `Backbone.item_representations`."""
        return self.item_vectors(rows)

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors of items, (...) -> (..., D); anything where a row is negative.

        In training the whole table is made once where more rows are asked for than there are items;
        without gradients it is made once and kept until a weight changes.
        """
        rows = rows.clamp(min=0)
        if not (self.training or torch.is_grad_enabled()):
            return F.embedding(rows, self.item_table())
        if rows.numel() > len(self.tokens_NL):
            return F.embedding(rows, self._made(None))
        return self._made(rows)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget the item table.

        Fused optimizers change weights without a note that the table could be compared with, and
        some training (preferences) never leaves evaluation mode.
        """
        self._made_table = None
        return super().train(mode)

    def item_table(self) -> Tensor:
        """Return the vectors of all items, (N, D), made once for the weights as they are.

        The same tensor until a weight changes or a mode is set; without gradients.
        """
        weights = [self.embedding.weight]
        weights += [self.own.weight, self.consumed_N1] if self.config.item_vectors else []
        if content := self._content():
            weights += [content.projection.weight, *content.buffers()]
        now = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        if self._made_table is None or self._made_table[0] != now:
            self._made_table = now, self._made(None)
        return self._made_table[1]

    def _content(self) -> Content | None:
        """Return what knows the items' content; None where there is none."""
        if not self.config.content:
            return None
        if "content" not in self._modules:
            raise UserError(
                "model.content: this model has not taken in item vectors, expected "
                "start_from(catalog) before it is used. Train with `genrec run`, or call it."
            )
        return self.content

    def _made(self, rows: Tensor | None) -> Tensor:
        """Return the vectors of items; None: of all, without reading rows one by one."""
        tokens = self.tokens_NL if rows is None else self.tokens_NL[rows]
        vectors: Tensor = self.embedding(tokens).sum(-2)
        if self.config.item_vectors:
            own = self.own.weight if rows is None else self.own(rows)
            vectors = vectors + own * self._keeps_own(rows)
        if content := self._content():
            vectors = vectors + (content.table() if rows is None else content(rows))
        return vectors

    def draw_items(self) -> None:
        """Draw which items the next training step knows without their own vectors."""
        if self.training and self.config.item_dropout:
            self._draws_N = torch.rand(len(self.tokens_NL), device=self.device)

    def _keeps_own(self, rows: Tensor | None) -> Tensor:
        """Return False for items that are known without vectors of their own, here or at all."""
        keeps = self.consumed_N1 if rows is None else self.consumed_N1[rows]
        if not self.training or not self.config.item_dropout:
            return keeps
        draws = self._draws_N if rows is None else self._draws_N[rows]
        return keeps & (draws >= self.config.item_dropout).unsqueeze(-1)
