"""BackboneContract: what every backbone must satisfy to be trained and searched.

Subclass it in a test file, set `backbone` and `options`, and pytest runs the whole contract. It
compares a backbone with itself only: cached with recomputed, alone with batched, loss with search.

Shapes: B requests, H history items, N items, L levels, R = B*W live rows, W rows per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from genrec.item_index import END
from genrec.models.base import Backbone, Batch, LossOutput, pad_histories

SIZES = (4, 3, 5)
MAX_HISTORY = 6
WORDS = np.array([[1, 0, 0], [1, 2, 0], [1, 2, 3], [4, 0, 0], [2, 4, 4], [3, 3, 0]])
HISTORIES = ((3, 1, 4, 1, 5), (), (9, 2, 6, 5, 3, 5), (8,), (7, 7))


def small_codes(num_items: int = 24, sizes: Sequence[int] = SIZES) -> np.ndarray:
    """Return unique codes (N, L) in a fixed random order."""
    grid = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1)
    return np.random.default_rng(0).permutation(grid.reshape(-1, len(sizes)))[:num_items]


def item_logprobs(model: Backbone, batch: Batch) -> Tensor:
    """Return log p(item | history) of all items, (B, N), through `begin` and `step`.

    Every item is a row of its own: slow, and free of any search.
    """
    num_requests, num_items = len(batch), len(model.tokens_NL)
    codes_NL = model.tokens_NL - model.level_offsets_L
    logits, state = model.begin(batch)
    parents_R = torch.arange(num_requests).repeat_interleave(num_items)
    total_R = torch.zeros(num_requests * num_items)
    for level in range(model.num_levels):
        codes_R = codes_NL[:, level].repeat(num_requests)
        logits_RK = logits[parents_R] if level == 0 else logits
        steps_R = logits_RK.log_softmax(-1).gather(1, codes_R[:, None])[:, 0]
        if level and model.shared_vocabulary:  # nothing is left to say after the end
            steps_R = steps_R.masked_fill((codes_NL[:, level - 1] == END).repeat(num_requests), 0)
        total_R = total_R + steps_R
        if level + 1 < model.num_levels:
            logits, state = model.step(codes_R, state, parents_R)
            parents_R = torch.arange(len(codes_R))
    return total_R.view(num_requests, num_items)


def path_logits(model: Backbone, history: Sequence[int], codes: Sequence[int]) -> Tensor:
    """Return the logits after a prefix of codes for one request alone, one row wide."""
    logits, state = model.begin(pad_histories([history], MAX_HISTORY))
    for code in codes:
        logits, state = model.step(torch.tensor([code]), state, torch.tensor([0]))
    return logits[0]


def recomputed_nll(model: Backbone, history: Sequence[int], item: int) -> Tensor:
    """Return -log p(item | history) from `loss`, which caches nothing."""
    if model.training_unit == "target":
        return model.loss(pad_histories([history], MAX_HISTORY, targets=[item])).loss_sum
    width = MAX_HISTORY + 1
    longer = model.loss(pad_histories([[*history, item]], width)).loss_sum
    return longer - model.loss(pad_histories([history], width)).loss_sum


def greedy_items(model: Backbone, batch: Batch) -> Tensor:
    """Return the codes (B, L) of taking the best code at each level, without a constraint."""
    logits, state = model.begin(batch)
    rows_B = torch.arange(len(batch))
    chosen = [logits.argmax(-1)]
    for _ in range(model.num_levels - 1):
        logits, state = model.step(chosen[-1], state, rows_B)
        chosen.append(logits.argmax(-1))
    return torch.stack(chosen, dim=1)


def training_batch(model: Backbone, sequences: Sequence[Sequence[int]]) -> Batch:
    """Return a batch whose last items are targets, whichever the training unit is."""
    if model.training_unit == "sequence":
        return pad_histories(sequences, MAX_HISTORY + 1)
    return pad_histories(
        [s[:-1] for s in sequences], MAX_HISTORY, targets=[s[-1] for s in sequences]
    )


def train(model: Backbone, batch: Batch, *, steps: int, optimizer: torch.optim.Optimizer) -> float:
    """Take `steps` optimizer steps on one batch; returns the last loss."""
    model.train()
    for _ in range(steps):
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    return float(output.loss.detach())


class BackboneContract:
    """Tests of one backbone; `options` are small, with `softmax: level` and dropout on."""

    backbone: ClassVar[type[Backbone]]
    options: ClassVar[dict[str, Any]]
    no_dropout: ClassVar[dict[str, Any]] = {"dropout": 0.0, "attention_dropout": 0.0}
    learning_rate: ClassVar[float] = 5e-3

    def configure(self, **options: Any) -> Any:
        """Return the configuration with these options; for backbones that nest them."""
        return self.backbone.Config(**options)

    def make(self, **changes: Any) -> Backbone:
        """Return a backbone with fresh weights, in evaluation mode."""
        torch.manual_seed(0)
        options = {"max_history": MAX_HISTORY, "dropout": 0.1, **self.options, **changes}
        codes_NL = small_codes()
        offsets = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
        tokens_NL = torch.from_numpy(codes_NL + offsets)
        model = self.backbone(self.configure(**options), tokens_NL, SIZES)
        with torch.no_grad():  # initial scores are nearly equal: spread them, so that tests bite
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        return model.eval()

    @torch.no_grad()
    def test_search_equals_recomputation(self) -> None:
        """Cached states give the same log-probabilities as `loss`, for every item."""
        model = self.make()
        found_BN = item_logprobs(model, pad_histories(HISTORIES, MAX_HISTORY))
        for history, found_N in zip(HISTORIES, found_BN, strict=True):
            expected_N = torch.stack(
                [-recomputed_nll(model, history, item) for item in range(len(found_N))]
            )
            torch.testing.assert_close(found_N, expected_N, atol=1e-4, rtol=0)
        assert found_BN.std() > 0.1

    def make_shared(self, **changes: Any) -> Backbone:
        """Return a backbone over words: semantic IDs of 1 to 3 codes out of 5, END included."""
        torch.manual_seed(0)
        options = {"max_history": MAX_HISTORY, "dropout": 0.0, **self.options, **changes}
        config = self.configure(**options)
        return self.backbone(config, torch.from_numpy(WORDS), (5, 5, 5), shared_vocabulary=True)

    @torch.no_grad()
    def test_a_shared_vocabulary_means_the_same_at_every_level(self) -> None:
        """One row of the table per word; cached states equal `loss`, which stops at END."""
        model = self.make_shared().eval()
        assert model.num_codes == model.num_tokens - model.first_token == 5
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        histories = [(3, 1, 4), (), (2, 0)]
        found_BN = item_logprobs(model, pad_histories(histories, MAX_HISTORY))
        for history, found_N in zip(histories, found_BN, strict=True):
            expected_N = torch.stack(
                [-recomputed_nll(model, history, item) for item in range(len(WORDS))]
            )
            torch.testing.assert_close(found_N, expected_N, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_loss_is_mean_negative_logprob_of_items(self) -> None:
        """`loss` averages -log p(item) over the items that it counts."""
        model = self.make()
        sequences = [(3, 1, 4), (2,), (6, 5, 3, 5, 8, 9), (7, 7)]
        output = model.loss(training_batch(model, sequences))
        ends = [
            [len(s) - 1] if model.training_unit == "target" else range(len(s)) for s in sequences
        ]
        pairs = [(s[:end], s[end]) for s, e in zip(sequences, ends, strict=True) for end in e]
        logprobs_MN = item_logprobs(model, pad_histories([h for h, _ in pairs], MAX_HISTORY))
        expected = -logprobs_MN[torch.arange(len(pairs)), [item for _, item in pairs]]
        assert int(output.num_targets) == len(pairs)
        torch.testing.assert_close(output.loss, expected.mean(), atol=1e-4, rtol=0)
        torch.testing.assert_close(output.loss_sum, expected.sum(), atol=1e-3, rtol=0)

    @torch.no_grad()
    def test_probabilities_of_all_codes_sum_to_one(self) -> None:
        """Level softmaxes make the tree of all code tuples a distribution."""
        model = self.make()
        full = small_codes(int(np.prod(SIZES))) + np.concatenate([[0], np.cumsum(SIZES)[:-1]])
        everything = self.backbone(model.config, torch.from_numpy(full), SIZES).eval()
        everything.load_state_dict(model.state_dict())
        mass_B = item_logprobs(everything, pad_histories([(3, 1), ()], MAX_HISTORY)).exp().sum(1)
        torch.testing.assert_close(mass_B, torch.ones(2), atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_width_changes_and_parents_are_gathered(self) -> None:
        """Any W per call, parents in any order: each row equals its path searched alone."""
        model = self.make()
        generator = torch.Generator().manual_seed(1)
        logits, state = model.begin(pad_histories(HISTORIES, MAX_HISTORY))
        paths: list[list[int]] = [[] for _ in HISTORIES]
        width = 1
        for level, new_width in enumerate((4, 2)):
            shape = (len(HISTORIES), new_width)
            local_BW = torch.randint(0, width, shape, generator=generator)
            parents_R = (local_BW + torch.arange(len(HISTORIES))[:, None] * width).flatten()
            codes_R = torch.randint(0, SIZES[level], (parents_R.numel(),), generator=generator)
            logits, state = model.step(codes_R, state, parents_R)
            paths = [
                [*paths[parent], code]
                for parent, code in zip(parents_R.tolist(), codes_R.tolist(), strict=True)
            ]
            width = new_width
            for row, path in enumerate(paths):
                alone = path_logits(model, HISTORIES[row // width], path)
                torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=0)
            assert logits.shape[1] == SIZES[level + 1] and logits.dtype == torch.float32

    @torch.no_grad()
    def test_an_old_state_stays_valid(self) -> None:
        """Stepping twice from one state gives the same twice: a search may try again wider."""
        model = self.make()
        _, state = model.begin(pad_histories([(3, 1), (2,)], MAX_HISTORY))
        codes_R, parents_R = torch.tensor([2, 0]), torch.tensor([0, 1])
        first, later = model.step(codes_R, state, parents_R)
        model.step(torch.tensor([1, 1]), later, parents_R)
        again, _ = model.step(codes_R, state, parents_R)
        assert torch.equal(first, again)

    @torch.no_grad()
    def test_padding_is_never_read(self) -> None:
        """More padding columns change neither the search nor the loss."""
        model = self.make()
        histories = [(3, 1, 4), (), (2,)]
        batch = pad_histories(histories, MAX_HISTORY)
        wide = torch.cat([batch.history_BH, torch.full((3, 2), -1)], dim=1)
        logits, wider = model.begin(batch)[0], model.begin(Batch(wide))[0]
        torch.testing.assert_close(logits, wider, atol=1e-5, rtol=0)
        batch = training_batch(model, [(3, 1, 4), (2,)])
        wide = torch.cat([batch.history_BH, torch.full((2, 2), -1)], dim=1)
        before, after = model.loss(batch), model.loss(Batch(wide, batch.target_B))
        torch.testing.assert_close(before.loss, after.loss, atol=1e-5, rtol=0)
        assert int(before.num_targets) == int(after.num_targets)

    @torch.no_grad()
    def test_empty_history_is_an_answer(self) -> None:
        """An empty history gives finite logits, alone, without columns, and of its own."""
        model = self.make()
        logits_BK = model.begin(pad_histories([(), (3,)], MAX_HISTORY))[0]
        alone_BK = model.begin(pad_histories([()], MAX_HISTORY))[0]
        no_columns = model.begin(Batch(torch.empty((1, 0), dtype=torch.int64)))[0]
        assert logits_BK.isfinite().all()
        torch.testing.assert_close(logits_BK[:1], alone_BK, atol=1e-5, rtol=0)
        torch.testing.assert_close(no_columns, alone_BK, atol=1e-5, rtol=0)
        assert not torch.allclose(logits_BK[0], logits_BK[1], atol=1e-3)

    @torch.no_grad()
    def test_items_beyond_max_history_have_no_influence(self) -> None:
        """Only the last `max_history` items count, and the oldest of them does."""
        model = self.make()
        last = [5, 3, 5, 8, 9, 7]
        histories = [[1, 2, *last], [4, *last], last, [1, *last[1:]]]
        padded = pad_histories(histories, max_history=99)
        logits_BK = model.begin(padded)[0]
        torch.testing.assert_close(logits_BK[0], logits_BK[2], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits_BK[1], logits_BK[2], atol=1e-5, rtol=0)
        assert not torch.allclose(logits_BK[3], logits_BK[2], atol=1e-5)
        tail = MAX_HISTORY + (model.training_unit == "sequence")
        targets = torch.tensor([1, 2, 3, 4]) if model.training_unit == "target" else None
        cut = pad_histories(histories, tail)
        long, short = (
            model.loss(Batch(padded.history_BH, targets)),
            model.loss(Batch(cut.history_BH, targets)),
        )
        torch.testing.assert_close(long.loss, short.loss, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_order_of_the_history_matters(self) -> None:
        """A sequence model, not a bag of items."""
        model = self.make()
        logits_BK = model.begin(pad_histories([(3, 1, 4), (4, 1, 3)], MAX_HISTORY))[0]
        assert not torch.allclose(logits_BK[0], logits_BK[1], atol=1e-3)

    @torch.no_grad()
    def test_no_target_sees_the_future(self) -> None:
        """Sequence models: another last item leaves the loss of the earlier ones as it was."""
        model = self.make()
        if model.training_unit != "sequence":
            return
        start = (3, 1, 4)
        last_N = item_logprobs(model, pad_histories([start], MAX_HISTORY))[0]
        earlier = [
            model.loss(pad_histories([(*start, item)], MAX_HISTORY + 1)).loss_sum + last_N[item]
            for item in (0, 9, 17)
        ]
        torch.testing.assert_close(earlier[0], earlier[1], atol=1e-4, rtol=0)
        torch.testing.assert_close(earlier[0], earlier[2], atol=1e-4, rtol=0)

    def test_overfits_32_sequences(self) -> None:
        """The loss falls and greedy search returns more than 95% of 32 memorised items."""
        rng = np.random.default_rng(0)
        model = self.make(**self.no_dropout)
        sequences = [
            rng.integers(0, 24, rng.integers(3, MAX_HISTORY + 1)).tolist() for _ in range(32)
        ]
        batch, prompts = training_batch(model, sequences), [s[:-1] for s in sequences]
        expected_BL = torch.from_numpy(small_codes()[[s[-1] for s in sequences]])
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        first, matched = float(model.loss(batch).loss.detach()), 0.0
        for _ in range(12):
            loss = train(model, batch, steps=25, optimizer=optimizer)
            with torch.no_grad():
                codes_BL = greedy_items(model, pad_histories(prompts, MAX_HISTORY))
            matched = float((codes_BL == expected_BL).all(1).float().mean())
            if matched == 1.0:
                break
        assert loss < 0.5 * first
        assert matched > 0.95

    def test_gradient_reaches_every_parameter(self) -> None:
        """No weight is dead."""
        model = self.make()
        model.loss(training_batch(model, [(3, 1, 4), (2, 6)])).loss.backward()
        learns = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        dead = [n for n, p in learns if p.grad is None or not p.grad.any()]
        assert learns and not dead

    @torch.no_grad()
    def test_targets_of_minus_one_are_not_counted(self) -> None:
        """A batch with nothing to predict has loss 0, not NaN."""
        model = self.make()
        none = Batch(torch.full((2, 3), -1), torch.full((2,), -1))
        output = model.loss(none)
        assert isinstance(output, LossOutput)
        assert float(output.loss) == 0.0 and int(output.num_targets) == 0

    def test_dropout_acts_in_training_only(self) -> None:
        """Two training losses differ; two evaluation losses are the same."""
        model = self.make(dropout=0.3)
        batch = training_batch(model, [(3, 1, 4), (2, 6)])
        assert torch.equal(model.loss(batch).loss, model(batch).loss)
        model.train()
        assert not torch.equal(model.loss(batch).loss, model.loss(batch).loss)

    @torch.no_grad()
    def test_state_dict_round_trip(self) -> None:
        """Weights, tables of items and config are all there is; the index is no part of them."""
        model = self.make()
        config = type(model.config).model_validate(model.config.to_dict())
        tokens_NL = model.tokens_NL - model.first_token
        other = self.backbone(config, tokens_NL, SIZES).eval()
        batch = pad_histories(HISTORIES, MAX_HISTORY)
        assert not torch.equal(other.begin(batch)[0], model.begin(batch)[0])
        other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
        assert torch.equal(other.begin(batch)[0], model.begin(batch)[0])
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert names <= set(model.state_dict()) <= names | set(model.item_tables)

    def test_bfloat16_autocast(self) -> None:
        """Loss, gradients and search work under autocast; logits stay float32."""
        model = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(training_batch(model, [(3, 1, 4), (2, 6)])).loss
            with torch.no_grad():
                logits, state = model.begin(pad_histories(HISTORIES, MAX_HISTORY))
                rows = torch.arange(len(HISTORIES))
                later, _ = model.step(logits.argmax(-1), state, rows)
        loss.backward()
        assert loss.isfinite() and loss.dtype == logits.dtype == later.dtype == torch.float32
