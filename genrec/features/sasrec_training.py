"""How SASRec is trained: all data in memory, batches of like length, early stopping.

It moves a network to its best epoch; it neither prepares interactions nor knows splits.

Shapes: B sequences of a batch, T places, S sequences, W windows, N items.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genrec.errors import TrainingError
from genrec.features.sasrec_network import Network
from genrec.runtime import choose_device, get_logger, progress

if TYPE_CHECKING:
    from genrec.features.sasrec import SASRecConfig

log = get_logger(__name__)

POOL = 16  # batches' worth of sequences that are sorted by length together
SCORED_TOGETHER = 512
VALIDATION_K = 10
CLIP_NORM = 5.0


@dataclass(frozen=True)
class Sequences:
    """Training sequences in memory, one after the other.

    Args:
        flat: item rows of all sequences, int64.
        offsets: (S + 1,) int64 into `flat`; every sequence has at least two items.
    """

    flat: np.ndarray
    offsets: np.ndarray

    @property
    def num_targets(self) -> int:
        """Number of places with a next item."""
        return int(self.offsets[-1]) - (len(self.offsets) - 1)


def windows(
    sequences: Sequences, max_history: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences into windows of at most `max_history` inputs; each place is in exactly one.

    A long sequence's first window has a random length, so that the cuts move from epoch to epoch.

    Returns:
        first place of each window in `flat` (W,), and its number of inputs (W,); the targets lie
        one place to the right.
    """
    starts, inputs = sequences.offsets[:-1], np.diff(sequences.offsets) - 1
    first = rng.integers(1, max_history + 1, size=len(inputs))
    first = np.where(inputs <= max_history, inputs, first)
    counts = 1 + -(-(inputs - first) // max_history)
    owner = np.repeat(np.arange(len(inputs)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(number == 0, 0, first[owner] + (number - 1) * max_history)
    end = np.minimum(first[owner] + number * max_history, inputs[owner])
    return starts[owner] + begin, end - begin


def batches(
    lengths: np.ndarray, batch_targets: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield all windows in random batches of like length, each of at most `batch_targets` places.

    Sorting within pools of random windows keeps batches mixed and nearly free of padding.
    """
    order = rng.permutation(len(lengths))
    pool = max(1, int(POOL * batch_targets / max(1.0, lengths.mean())))
    found = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(-lengths[part], kind="stable")]
        place = 0
        while place < len(part):
            size = max(1, batch_targets // int(lengths[part[place]]))
            found.append(part[place : place + size])
            place += size
    for number in rng.permutation(len(found)):
        yield found[number]


def train(
    network: Network,
    sequences: Sequences,
    config: SASRecConfig,
    validation: tuple[Sequence[np.ndarray], np.ndarray] | None,
) -> list[dict[str, float]]:
    """Train a network in place and leave it at its best epoch.

    Args:
        network: on its device.
        sequences: what to learn from.
        config: settings.
        validation: histories and their target rows; None trains all epochs.

    Returns:
        one line per epoch: epoch, loss and, with validation, ndcg@10 and recall@10.

    Raises:
        TrainingError: the loss is not a finite number any more.
    """
    device = network.items.weight.device
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    shown = _averaged(network, optimizer, config.average) if config.average else network
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    flat = torch.from_numpy(sequences.flat).to(device)
    history: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Any]] = (-1.0, 0, {})
    with progress("Training SASRec", config.epochs) as advance:
        for epoch in range(1, config.epochs + 1):
            loss = _epoch(network, optimizer, flat, sequences, config, rng, generator)
            if not np.isfinite(loss):
                raise TrainingError(
                    f"sasrec: the loss of epoch {epoch} is {loss}. Lower sasrec.learning_rate "
                    f"(now {config.learning_rate:g})."
                )
            history.append({"epoch": epoch, "loss": loss})
            advance(1)
            if validation is not None:
                history[-1].update(validate(shown, *validation))
            told = ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items())
            log.info("sasrec: %s", told)
            if validation is None:
                continue
            if history[-1]["ndcg@10"] > best[0]:
                best = (history[-1]["ndcg@10"], epoch, copy.deepcopy(shown.state_dict()))
            elif epoch - best[1] >= config.patience:
                break
    network.load_state_dict(best[2] or shown.state_dict())
    if best[2]:
        log.info("sasrec: best of %d epochs: %d (NDCG@10 %.4f).", len(history), best[1], best[0])
    network.eval()
    return history


def _averaged(network: Network, optimizer: torch.optim.Optimizer, decay: float) -> Network:
    """Return a copy of the network that each step of the optimizer moves towards it."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(network))
    shown = average.module
    assert isinstance(shown, Network)
    return shown


def _epoch(
    network: Network,
    optimizer: torch.optim.Optimizer,
    flat: Tensor,
    sequences: Sequences,
    config: SASRecConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> float:
    network.train()
    starts, lengths = windows(sequences, config.max_history, rng)
    total = torch.zeros((), device=flat.device)
    for chosen in batches(lengths, config.batch_targets, rng):
        first_B1 = torch.from_numpy(starts[chosen]).to(flat.device)[:, None]
        length_B1 = torch.from_numpy(lengths[chosen]).to(flat.device)[:, None]
        step_T = torch.arange(int(lengths[chosen].max()), device=flat.device)
        real_BT = step_T < length_B1
        place_BT = first_B1 + torch.where(real_BT, step_T, 0)
        targets_BT = torch.where(real_BT, flat[place_BT + 1], -1)
        loss = network.loss(flat[place_BT], targets_BT, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        total += loss.detach() * int(lengths[chosen].sum())
    return float(total) / int(lengths.sum())


@torch.no_grad()
def score(network: Network, histories: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield scores (B, N) of non-empty histories, a few hundred at a time, in their order."""
    network.eval()
    device, longest = network.items.weight.device, network.config.max_history
    for start in range(0, len(histories), SCORED_TOGETHER):
        recent = [np.asarray(h)[-longest:] for h in histories[start : start + SCORED_TOGETHER]]
        lengths = np.array([len(h) for h in recent])
        items_BT = np.zeros((len(recent), lengths.max()), dtype=np.int64)
        items_BT[np.arange(items_BT.shape[1]) < lengths[:, None]] = np.concatenate(recent)
        hidden_BTD = network(torch.from_numpy(items_BT).to(device))
        last_BD = hidden_BTD[torch.arange(len(recent)), torch.from_numpy(lengths - 1)]
        scores_BN = network.queries(last_BD) @ network.item_outputs().T
        if network.config.repeat_bias:
            exists_BT = np.arange(items_BT.shape[1]) < lengths[:, None]
            history_BT = torch.from_numpy(np.where(exists_BT, items_BT, -1)).to(device)
            bias_BT = network.repeats.of_history(history_BT)
            scores_BN = scores_BN.scatter_add(1, history_BT.clamp(min=0), bias_BT)
        yield scores_BN


def validate(
    network: Network, histories: Sequence[np.ndarray], targets: np.ndarray
) -> dict[str, float]:
    """Return NDCG@10 and recall@10 over the whole catalogue, seen items kept in."""
    order = np.argsort([len(h) for h in histories], kind="stable")
    wanted = torch.from_numpy(targets[order].astype(np.int64))
    ranks, start = [], 0
    for scores_BN in score(network, [histories[i] for i in order]):
        target_B1 = wanted[start : start + len(scores_BN), None].to(scores_BN.device)
        ranks.append((scores_BN > scores_BN.gather(1, target_B1)).sum(1).cpu())
        start += len(scores_BN)
    rank = torch.cat(ranks).double()
    hit = rank < VALIDATION_K
    return {
        "ndcg@10": float((hit / torch.log2(rank + 2)).mean()),
        "recall@10": float(hit.double().mean()),
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch for initialisation and dropout, and leave its state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build(num_items: int, config: SASRecConfig) -> Network:
    """Return an untrained network on the best device."""
    return Network(num_items, config).to(choose_device())
