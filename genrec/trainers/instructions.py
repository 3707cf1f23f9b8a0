"""How does a language model learn a mixture of instructions? By the likelihood of their responses.

What the instructions are is in `genrec.instructions`; this joins them to a pretrained backbone and
to the loop of training. Validation is the constrained search of next items, as ever.

Shapes: X examples of an epoch, B examples of a batch, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from genrec.asking import make_encoder
from genrec.data import Catalog, Interactions
from genrec.errors import ConfigError
from genrec.instructions.encoding import Encoded
from genrec.instructions.mixture import EpochPlan, Example, Mixture, MixtureConfig
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, LossOutput
from genrec.models.pretrained import PretrainedBackbone
from genrec.models.responses import ResponseLoss, Responses, collate_responses
from genrec.trainers.base import Trainer
from genrec.trainers.batching import BLOCK_BATCHES, Spans, TrainingExamples
from genrec.trainers.config import LoopConfig
from genrec.trainers.place import Place

WORDS_OF_A_TITLE = 8  # tokens that a title is taken to have when examples are sorted by length


@dataclass(frozen=True)
class Picks(Spans):
    """The examples of an epoch; `start` and `stop` say how long they may be."""

    plan: EpochPlan
    epoch: int


class InstructionExamples(TrainingExamples):
    """A mixture in the form that the loop reads.

    Args:
        mixture: gives the examples.
        model: whose tokens they are written in.
        seed: of the mixture's draws.
    """

    def __init__(self, mixture: Mixture, model: PretrainedBackbone, *, seed: int) -> None:
        interactions = mixture.sources.interactions
        super().__init__(interactions, "target", mixture.sources.max_history)
        self.mixture, self.kind, self.seed = mixture, model.kind, seed
        self.num_levels = model.num_levels
        self.encoder = make_encoder(model, max_tokens=mixture.config.max_tokens)
        self.frame = (list(model.before), list(model.after) if model.kind == "seq2seq" else [])

    def plan(self, batch_size: int, seed: int, epoch: int) -> tuple[Spans, list[np.ndarray]]:
        """Return the epoch's examples and its batches, alike in length within a batch."""
        plan = self.mixture.plan(seed, epoch)
        words = np.array(["title" in name for name in self.mixture.tasks])
        per_item = np.where(words, WORDS_OF_A_TITLE, self.num_levels)
        length = self.mixture.history_lengths(plan) * per_item[plan.tasks]
        picks = Picks(np.zeros_like(length), length, plan, epoch)
        order = np.random.default_rng([seed, epoch, 2]).permutation(len(plan))
        batches: list[np.ndarray] = []
        for begin in range(0, len(order), batch_size * BLOCK_BATCHES):
            block = order[begin : begin + batch_size * BLOCK_BATCHES]
            block = block[np.argsort(length[block], kind="stable")]
            batches.extend(np.array_split(block, range(batch_size, len(block), batch_size)))
        shuffled = np.random.default_rng([seed, epoch, 6]).permutation(len(batches))
        return picks, [batches[i] for i in shuffled]

    def batch(self, spans: Spans, chosen: np.ndarray) -> Any:
        """Return the chosen examples as `Responses`, on the CPU."""
        assert isinstance(spans, Picks)
        made = [self.encoded(spans, int(number)) for number in chosen]
        return collate_responses(
            [encoded.prompt for _, encoded in made],
            [encoded.response for _, encoded in made],
            [task for task, _ in made],
            self.kind,
        )

    def encoded(self, picks: Picks, number: int) -> tuple[int, Encoded]:
        """Return the task and the tokens of an example; histories shrink until it fits."""
        limit = self.max_history
        while True:
            found = self.mixture.example(
                picks.plan, number, self.seed, picks.epoch, max_history=limit
            )
            if found.plain:
                return found.task, self._plain(found)
            if limit <= 1 or self.encoder.fits(found.text):
                return found.task, self.encoder.encode(found.text)
            limit //= 2

    def _plain(self, found: Example) -> Encoded:
        """Return a history as the search asks; causal models learn all its items."""
        before, after = self.frame
        history = self.encoder.tokens(found.text.prompt)
        target = self.encoder.tokens(found.text.response)
        if self.kind == "seq2seq":
            return Encoded([*before, *history, *after], target)
        return Encoded(before, [*history, *target])


class InstructionTrainer(Trainer):
    """Learns a mixture of instructions; loss on responses only.

    Args:
        config: options.
        seed: of mixing, wording, shuffling and dropout.
    """

    class Config(LoopConfig):
        """Options of learning instructions."""

        name: Literal["instructions"] = "instructions"
        """Name in the registry."""
        mixture: MixtureConfig = MixtureConfig()
        """Tasks, their weights, and how they are worded."""
        per: Literal["token", "response"] = "token"
        """What counts alike: each token of a response, as in LC-Rec, or each response; with
        "response" the loss is the mean of -log p(response)."""

        def reads(self, catalog: Catalog) -> dict[str, str]:
            """Return digests of the catalogue's words and of the templates."""
            return self.mixture.reads(catalog)

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self._catalog: Catalog | None = None

    def start(self, model: Backbone, index: ItemIndex, catalog: Catalog) -> None:
        """Start as ever, let the text head train, and take the catalogue's words.

        Raises:
            ConfigError: a backbone without a language model.
        """
        if not isinstance(model, PretrainedBackbone):
            raise ConfigError(
                f"trainer.name: got 'instructions' for a {type(model).__name__}, which reads no "
                "text. Set model.name=pretrained_causal or model.name=pretrained_seq2seq."
            )
        super().start(model, index, catalog)
        model.train_text_head()
        self._catalog = catalog

    def examples(self, model: Backbone, training: Interactions) -> TrainingExamples:
        """Return the mixture of a model; call `start` first.

        Raises:
            ConfigError: templates or tasks that do not fit the data.
        """
        assert isinstance(model, PretrainedBackbone) and self._catalog is not None
        mixture = Mixture(self.config.mixture, self._catalog, training, model.config.max_history)
        tasks = mixture.tasks
        self.figures = tuple(f"{name}/{what}" for what in ("nll", "tokens") for name in tasks)
        self.figures += tuple(f"{name}/responses" for name in tasks)
        return InstructionExamples(mixture, model, seed=self.seed)

    def learner(self, model: Backbone) -> nn.Module:
        """Return the model itself."""
        return model

    def make_batch(
        self, examples: TrainingExamples, spans: Spans, chosen: np.ndarray, place: Place
    ) -> Any:
        """Return `Responses`: a function of the examples only."""
        return examples.batch(spans, chosen)

    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        """Return the loss of responses, with sums per task as figures."""
        output: ResponseLoss = model(batch)
        assert isinstance(batch, Responses)
        return output.per_task(batch.tasks_B, len(self.figures) // 3, per=self.config.per)

    def report(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return mean losses per task, of a token and of a response in nats, and shares."""
        tasks = [name.rpartition("/")[0] for name in figures if name.endswith("/nll")]
        total = sum(figures[f"{name}/responses"] for name in tasks) or 1.0
        values: dict[str, float] = {}
        for name in tasks:
            nll, responses = figures[f"{name}/nll"], figures[f"{name}/responses"]
            tokens = figures[f"{name}/tokens"]
            if responses:
                values[f"task/{name}/loss"] = nll / tokens
                values[f"task/{name}/response_loss"] = nll / responses
            values[f"task/{name}/share"] = responses / total
        return values
