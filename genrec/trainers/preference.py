"""How is a trained model taught to prefer what users chose over what it would have said itself?

Direct preference optimisation on items: DPO (Rafailov et al. 2023) with one rejected item per
choice, S-DPO (Chen et al. 2024) with several. The rejected ones are drawn from the model as it was,
constrained to the catalogue. Probabilities are those of the constrained search. It knows no
optimizer.

Shapes: B requests, X rejected items, L levels, K codes, N items, R = B * (1 + X) rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.data import Catalog, Interactions
from genrec.decoding import CSRIndex, Filters
from genrec.decoding.sampling import sample
from genrec.errors import ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch, LossOutput
from genrec.models.catalogue_tree import CatalogueTree
from genrec.trainers.base import Trainer
from genrec.trainers.batching import Spans, TrainingExamples
from genrec.trainers.config import LoopConfig
from genrec.trainers.place import Place
from genrec.trainers.trained import find_model, sized_like
from genrec.weights import load_model_arrays


class Preference(Trainer):
    """DPO and S-DPO against a frozen copy of the model that tuning starts from."""

    class Config(LoopConfig):
        """Options of preference tuning, the second stage after `next_item`."""

        name: Literal["preference"] = "preference"
        """Name in the registry."""
        start_from: str
        """Trained model that is tuned and that stays as the reference: a run, a bundle or what
        `genrec train` wrote; of the same data, index and `model` section."""
        epochs: int = Field(default=3, ge=1)
        """Passes over the training data at most."""
        learning_rate: float = Field(default=1e-4, gt=0)
        """Peak learning rate of AdamW."""
        beta: float = Field(default=0.1, gt=0)
        """How much the model may leave its start: log-ratios are multiplied by it."""
        num_negatives: int = Field(default=3, ge=1)
        """Rejected items per choice. 1: DPO; more: S-DPO, a softmax over them."""
        temperature: float = Field(default=1.0, gt=0)
        """Of the distribution that they are drawn from; above 1 they are less likely items."""
        likelihood: float = Field(default=0.0, ge=0)
        """Weight of -log p(chosen item) beside the preference loss; 0: none."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return the fingerprint of the model that tuning starts from."""
            return {"start_from": find_model(self.start_from).fingerprint}

    figures = ("margin", "accuracy")
    trains_shards: ClassVar[bool] = False
    goes_on = True
    _constraint: CSRIndex
    _reference: Backbone

    def unit(self, model: Backbone) -> Literal["target", "sequence"]:
        """Return "target": a choice is one history and what followed it."""
        return "target"

    def sized(self, config: Any, training: Interactions) -> Any:
        """Return the configuration with the size of the model to go on from, whatever the data."""
        return sized_like(config, self.config.start_from)

    def start(self, model: Backbone, index: ItemIndex, catalog: Catalog) -> None:
        """Give the model the weights that tuning starts from.

        Raises:
            UserError: no trained model there.
            MismatchError: a model of another index.
            ArtifactError: a model of another architecture.
        """
        artifact = find_model(self.config.start_from)
        artifact.require_upstream("index", index.fingerprint)
        model.start_from(catalog)
        load_model_arrays(model, artifact.arrays)
        self._constraint = CSRIndex.from_index(index)

    def weights(self, training: Interactions) -> np.ndarray | None:
        """Return None: every choice counts alike."""
        return None

    def learner(self, model: Backbone) -> nn.Module:
        """Return the loss against a frozen copy of the model as it is now.

        Raises:
            ConfigError: an option of the loop that needs what is not there.
        """
        if self.config.gradient_checkpointing:
            raise ConfigError(
                "trainer.gradient_checkpointing: got true for preference tuning, which reads "
                "histories as a search does, expected false. Set trainer.accumulation higher."
            )
        self._reference = copy.deepcopy(model).requires_grad_(False).eval()
        self._constraint = self._constraint.to(model.device)
        return PreferenceLearner(model, self._reference, self.config)

    def helpers(self, learner: nn.Module) -> Mapping[str, nn.Module]:
        """Return none: the reference is read again where training goes on."""
        return {}

    def make_batch(
        self, examples: TrainingExamples, spans: Spans, chosen: np.ndarray, place: Place
    ) -> Batch:
        """Return choices with rejected items, drawn per choice from (seed, epoch, choice)."""
        batch = examples.batch(spans, chosen)
        assert batch.target_B is not None
        first = (self.seed * 100_003 + place.epoch) << 32
        drawn = sample(
            self._reference,
            batch.histories().to(self._constraint.device),
            self._constraint,
            num_samples=self.config.num_negatives,
            temperature=self.config.temperature,
            replacement=False,
            filters=Filters(exclude=[np.array([row]) for row in batch.target_B.tolist()]),
            seed=[(first + int(row)) % 2**63 for row in chosen],
        )
        return replace(batch, negatives=drawn.rows_BS)


class PreferenceLearner(nn.Module):
    """The preference loss of a batch of choices.

    Dropout is off: what is learned is a difference to the reference.

    Args:
        model: learns.
        reference: does not; a copy of the model as it started.
        config: beta and the weight of the likelihood.
    """

    def __init__(self, model: Backbone, reference: Backbone, config: Preference.Config) -> None:
        super().__init__()
        self.model, self.reference, self.config = model, reference, config
        self.tree = CatalogueTree(model.tokens_NL.cpu(), model.level_offsets_L.cpu())
        self.tree.to(model.device)

    def train(self, mode: bool = True) -> PreferenceLearner:
        """Stay in evaluation mode, in which there is no dropout."""
        return super().train(False)

    def forward(self, batch: Batch) -> LossOutput:
        """Return the loss summed over choices; choices without rejected items count 0."""
        if batch.target_B is None or batch.negatives is None:
            raise UserError(
                "PreferenceLearner: got a batch without target_B or negatives, expected both. "
                "Make it with Preference.make_batch."
            )
        rows_BX = torch.cat([batch.target_B[:, None], batch.negatives], 1)
        policy_BX = item_logprobs(self.model, self.tree, batch, rows_BX)
        with torch.no_grad():
            before_BX = item_logprobs(self.reference, self.tree, batch, rows_BX)
        is_drawn_BX = batch.negatives >= 0
        valid_B = is_drawn_BX.any(1)
        gains_BX = self.config.beta * (policy_BX - before_BX)
        loss_B = preference_loss(gains_BX[:, 0], gains_BX[:, 1:], is_drawn_BX)
        loss_B = (loss_B - self.config.likelihood * policy_BX[:, 0]).masked_fill(~valid_B, 0.0)
        margins_BX = (gains_BX[:, :1] - gains_BX[:, 1:]).detach()
        counts_B = is_drawn_BX.sum(1).clamp(min=1)
        means = [
            (values.masked_fill(~is_drawn_BX, 0.0).sum(1) / counts_B).sum()
            for values in (margins_BX, (margins_BX > 0).float())
        ]
        return LossOutput.of(loss_B.sum(), valid_B.sum(), figures=torch.stack(means))


def preference_loss(chosen_B: Tensor, rejected_BX: Tensor, is_drawn_BX: Tensor) -> Tensor:
    """Return -log sigmoid(-log sum over x of exp(rejected - chosen)), (B,).

    S-DPO (Chen et al. 2024); with one rejected item it is DPO's equation 7 (Rafailov
    et al. 2023).

    Args:
        chosen_B: beta times the log-ratio of policy to reference of the chosen items.
        rejected_BX: of the rejected ones.
        is_drawn_BX: bool, which of these there are; of none the loss is log 2 without gradient.
    """
    gaps_BX = rejected_BX - chosen_B[:, None]
    some_B1 = is_drawn_BX.any(1, keepdim=True)
    gaps_BX = torch.where(is_drawn_BX, gaps_BX, -torch.inf)
    gaps_BX = torch.where(some_B1, gaps_BX, -np.log(max(1, gaps_BX.shape[1])))
    return F.softplus(gaps_BX.logsumexp(1))


def item_logprobs(model: Backbone, tree: CatalogueTree, batch: Batch, rows_BX: Tensor) -> Tensor:
    """Return log p(item | history) among the items of the catalogue, (B, X), with gradients.

    Histories are read once, whatever the number of items; as a search, level by level, among the
    codes that lead on to an item.

    Args:
        model: any backbone.
        tree: of its items.
        batch: histories, and what is known beside them.
        rows_BX: int64 item rows; -1 is answered for with anything.
    """
    rows_R = rows_BX.clamp(min=0).flatten()
    codes_RL = model.tokens_NL[rows_R] - model.level_offsets_L
    logits, state = model.begin(batch.histories())
    parents_R = torch.arange(len(rows_BX), device=rows_R.device).repeat_interleave(rows_BX.shape[1])
    logits_RK, total_R = logits[parents_R], torch.zeros(len(rows_R), device=rows_R.device)
    for level in range(model.num_levels):
        open_RK = tree.keep_children(logits_RK, rows_R, level)
        steps_R1 = open_RK.log_softmax(-1).gather(1, codes_RL[:, level : level + 1])
        total_R = total_R + steps_R1[:, 0]
        if level + 1 < model.num_levels:
            logits_RK, state = model.step(codes_RL[:, level], state, parents_R)
            parents_R = torch.arange(len(rows_R), device=rows_R.device)
    return total_R.view(rows_BX.shape)
