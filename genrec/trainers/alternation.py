"""Generator of textual ids and recommender in turns: how a recommender teaches what to call items.

IDGenRec (Tan et al. 2024, 2403.19021, section 3.4): with the recommender M frozen, the generator G
learns through *expected embeddings*, E_t = sum over codes v of p_G(v | t) E_M[v], put where M's
prompt has the codes of the history's items; the loss is M's cross-entropy on the target. Then ids
are generated again and M is trained on them. p_G are probabilities (the released code mixes by
log-probabilities). How M is trained is the caller's business.

Shapes: B histories, H history items, M items of a batch's histories, L levels, V codes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from genrec.errors import TrainingError, UserError
from genrec.inference import evaluating
from genrec.item_index import END, ItemIndex
from genrec.models.base import FIRST_TOKEN, Batch
from genrec.models.scratch import ScratchBackbone
from genrec.runtime import get_logger, progress
from genrec.tokenizers.textual import Textual
from genrec.trainers.batching import TrainingExamples

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

log = get_logger(__name__)


@dataclass(frozen=True)
class Round:
    """What one turn leaves behind.

    Args:
        tokenizer: with the generator of this round.
        index: the ids that it gave.
        model: the recommender trained on them.
        generator_loss: mean loss while the generator learned, nats per target; NaN in round 0.
    """

    tokenizer: Textual
    index: ItemIndex
    model: ScratchBackbone
    generator_loss: float


def alternate(
    tokenizer: Textual,
    catalog: Catalog,
    interactions: Interactions,
    train: Callable[[ItemIndex, ScratchBackbone | None], ScratchBackbone],
    *,
    collisions: str = "first_unused",
) -> list[Round]:
    """Return round 0 (ids of the fitted generator) and `alternation.rounds` more.

    Args:
        tokenizer: fitted; it does not change, every round has a tokenizer of its own.
        catalog: the items.
        interactions: of all splits; only the training part is used.
        train: trains a recommender on an index, starting from the previous round's where one is
            given (`warm_start` copies what fits).
        collisions: policy that makes ids unique.
    """
    rounds: list[Round] = []
    loss = float("nan")
    for number in range(tokenizer.config.alternation.rounds + 1):
        if number:
            last = rounds[-1]
            tokenizer, loss = refine(
                tokenizer, last.index, last.model, catalog, interactions, number=number
            )
        index = ItemIndex.build(tokenizer, catalog, collisions=collisions)
        model = train(index, rounds[-1].model if rounds else None)
        rounds.append(Round(tokenizer, index, model, loss))
        if number:
            log.info(
                "alternation round %d: generator loss %.4f, %d of %d items renamed.",
                number, loss, _num_renamed(index, rounds[-2].index), len(index),
            )  # fmt: skip
    return rounds


def refine(
    tokenizer: Textual,
    index: ItemIndex,
    model: ScratchBackbone,
    catalog: Catalog,
    interactions: Interactions,
    *,
    number: int = 1,
) -> tuple[Textual, float]:
    """Train a copy of a tokenizer's generator through a frozen recommender.

    Args:
        tokenizer: fitted; left as it is.
        index: the ids of the catalogue that the recommender was trained on.
        model: the recommender; left as it is, bit for bit.
        catalog: the items of the index, in its order.
        interactions: of all splits; only the training part is used.
        number: of the round; it moves the seed of the shuffling.

    Returns:
        the new tokenizer, and the mean loss of its last epoch (nats per target item).

    Raises:
        TrainingError: the loss became NaN or infinite, or there is no target with a history.
    """
    config = tokenizer.config.alternation
    learner = GeneratorTrainer(tokenizer, index, model, catalog)
    examples = TrainingExamples.for_model(model, interactions.training(), "target")
    seed = tokenizer.config.seed * 1_000 + number
    mean = float("nan")
    for epoch in range(config.num_epochs):
        spans, batches = examples.plan(config.batch_size, seed, epoch)
        batches = [rows[spans.stop[rows] - spans.start[rows] > 1] for rows in batches]
        losses = []
        with progress("generator", len(batches)) as advance:
            for rows in batches:
                if len(rows):
                    losses.append(learner.step(examples.batch(spans, rows)))
                advance(1)
        mean = float(np.mean(losses)) if losses else float("nan")
        if not np.isfinite(mean):
            raise TrainingError(
                f"alternation: the generator's loss is {mean} over {len(losses)} batches. Expected "
                "users with at least two training interactions and a smaller "
                f"tokenizer.alternation.learning_rate (now {config.learning_rate})."
            )
    learner.tokenizer.generator.cpu()
    return learner.tokenizer, mean


class GeneratorTrainer:
    """Steps of a generator through a frozen recommender.

    Args:
        tokenizer: fitted; a copy of it learns.
        index: ids of the catalogue, of the tokenizer's vocabulary (numbers of collisions beyond).
        model: the recommender; any backbone with a shared vocabulary.
        catalog: the items of the index, in its order.

    Raises:
        UserError: index, model and tokenizer do not belong together.
    """

    def __init__(
        self, tokenizer: Textual, index: ItemIndex, model: ScratchBackbone, catalog: Catalog
    ) -> None:
        _check(tokenizer, index, model, catalog)
        self.tokenizer = Textual(tokenizer.config).load_state(tokenizer.state())
        self.model = model
        self.texts = self.tokenizer.texts(catalog)
        self.codes_NL = torch.from_numpy(index.codes.astype(np.int64)).to(model.device)
        generator = self.tokenizer.generator.to(model.device)
        rate = tokenizer.config.alternation.learning_rate
        self.optimizer = torch.optim.AdamW(generator.parameters(), lr=rate)

    def step(self, batch: Batch) -> float:
        """Take one optimizer step on the generator; return the loss before it, nats per target.

        Args:
            batch: histories with at least one item, and their targets.
        """
        generator = self.tokenizer.generator
        self.optimizer.zero_grad(set_to_none=True)
        rows_M, place_BH = torch.unique(batch.history_BH, return_inverse=True)
        padded = int(rows_M[0] < 0)  # -1 sorts first
        history_BM = torch.where(batch.history_BH < 0, -1, place_BH - padded)
        embeddings_MLD = self.item_embeddings(rows_M[padded:])
        loss = spliced_loss(self.model, embeddings_MLD, history_BM, batch.target_B)
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def item_embeddings(self, rows_M: Tensor) -> Tensor:
        """Return what stands for items in the recommender's prompt, (M, L, D).

        Expected embeddings where the id has words; the plain ones for END and for the numbers of
        collisions, which the generator does not choose.
        """
        generator = self.tokenizer.generator
        weight_VD = self.model.embedding.weight.detach()[FIRST_TOKEN:]
        codes_ML = self.codes_NL[rows_M.to(self.codes_NL.device)]
        num_codes = self.tokenizer.codebook_sizes[0]
        is_word_ML = (codes_ML != END) & (codes_ML < num_codes)
        known_ML = codes_ML.masked_fill(~is_word_ML, END)
        logits_MLV = generator.logits([self.texts[row] for row in rows_M.tolist()], known_ML)
        expected_MLD = expected_embeddings(logits_MLV.softmax(-1), weight_VD[:num_codes])
        return torch.where(is_word_ML[..., None], expected_MLD, weight_VD[codes_ML])


def expected_embeddings(probabilities: Tensor, weight_VD: Tensor) -> Tensor:
    """Return sum over v of p(v) E[v], (..., V) -> (..., D); the look-up where p is one-hot."""
    return probabilities.to(weight_VD.dtype) @ weight_VD


def spliced_loss(
    model: ScratchBackbone, embeddings_MLD: Tensor, history_BH: Tensor, target_B: Tensor | None
) -> Tensor:
    """Return a frozen recommender's mean -log p(target | history) over given item embeddings.

    The model runs as it is (in evaluation mode, without gradients of its own): its embedding table
    is lent M * L more rows, and its item table M more items that point at them.

    Args:
        model: any backbone with a shared vocabulary; its weights stay as they are, bit for bit.
        embeddings_MLD: what stands for the L codes of M items in the prompt.
        history_BH: int64 places in 0..M-1, right-padded with -1.
        target_B: int64 item rows of the index.
    """
    assert target_B is not None
    num_items, num_tokens = len(model.tokens_NL), len(model.embedding.weight)
    lent_ML = torch.arange(embeddings_MLD.shape[:2].numel(), device=model.device)
    lent_ML = lent_ML.reshape(embeddings_MLD.shape[:2]) + num_tokens
    tables = {
        "model.embedding.weight": torch.cat(
            [model.embedding.weight.detach(), embeddings_MLD.flatten(0, 1)]
        ),
        "model.tokens_NL": torch.cat([model.tokens_NL, lent_ML]),
    }
    history_BH = torch.where(history_BH < 0, -1, history_BH + num_items).to(model.device)
    codes_BL = model.tokens_NL[target_B.to(model.device)] - FIRST_TOKEN
    frozen = {name: weight.detach() for name, weight in model.named_parameters(prefix="model")}
    with evaluating(model):
        loss: Tensor = functional_call(
            _TargetLoss(model), {**frozen, **tables}, (history_BH, codes_BL)
        )
    return loss


class _TargetLoss(nn.Module):
    """Mean negative log-likelihood of targets, level by level as a search would read them."""

    def __init__(self, model: ScratchBackbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, history_BH: Tensor, codes_BL: Tensor) -> Tensor:
        """Return a scalar from histories and the targets' codes."""
        parents_B = torch.arange(len(history_BH), device=history_BH.device)
        logits_BV, state = self.model.begin(Batch(history_BH))
        total = logits_BV.new_zeros(())
        live_B = torch.ones_like(parents_B, dtype=torch.bool)
        for level in range(codes_BL.shape[1]):
            nll_B = F.cross_entropy(logits_BV, codes_BL[:, level], reduction="none")
            total = total + nll_B.masked_fill(~live_B, 0.0).sum()
            live_B = live_B & (codes_BL[:, level] != END)
            if level + 1 < codes_BL.shape[1]:
                logits_BV, state = self.model.step(codes_BL[:, level], state, parents_B)
        return total / max(1, len(history_BH))


@torch.no_grad()
def warm_start(model: ScratchBackbone, earlier: ScratchBackbone) -> ScratchBackbone:
    """Copy a backbone's weights into another of the same configuration; return the latter.

    Words keep their codes from round to round, numbers of collisions and levels may come and go:
    of a table whose length differs, the rows that both have are copied.
    """
    source = dict(earlier.named_parameters())
    for name, weight in model.named_parameters():
        shared = tuple(
            slice(min(a, b)) for a, b in zip(weight.shape, source[name].shape, strict=True)
        )
        weight[shared] = source[name][shared].to(weight.device)
    return model


def _check(tokenizer: Textual, index: ItemIndex, model: ScratchBackbone, catalog: Catalog) -> None:
    if not index.shared_vocabulary or index.num_tokens < tokenizer.codebook_sizes[0]:
        raise UserError(
            f"alternation: got an index of {index.num_tokens} codes, expected at least the "
            f"{tokenizer.codebook_sizes[0]} of the tokenizer in one shared vocabulary. Build it "
            "with ItemIndex.build(tokenizer, catalog, collisions='first_unused')."
        )
    if model.codebook_sizes != index.codebook_sizes or len(model.tokens_NL) != len(index):
        raise UserError(
            f"alternation: the model has {len(model.tokens_NL)} items and levels "
            f"{model.codebook_sizes}, the index {len(index)} and {index.codebook_sizes}. Expected "
            "a model that was trained on this index."
        )
    if list(catalog.item_ids) != list(index.item_ids):
        raise UserError(
            "alternation: the catalogue does not list the items of the index in its order. Build "
            "the index from this catalogue."
        )
    if model.config.softmax != "level" and model.config.tie_embeddings:
        raise UserError(
            "alternation: got model.softmax=vocabulary with tied embeddings, expected "
            "model.softmax=level: the embeddings that are lent to the prompt are no tokens."
        )


def _num_renamed(index: ItemIndex, earlier: ItemIndex) -> int:
    width = max(index.num_levels, earlier.num_levels)
    one, other = (
        np.pad(each.codes, ((0, 0), (0, width - each.num_levels)), constant_values=END)
        for each in (index, earlier)
    )
    return int((one != other).any(axis=1).sum())
