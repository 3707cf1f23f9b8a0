"""How an RQ-VAE learns: its network, what a step minimises, its training loop.

The whole catalogue stays on the device and there is no data loader: a step costs little more than
its matrix products. How codebooks move without gradients is in `codebooks.py`; what a tokenizer
offers to the outside in `rqvae.py`.

Shapes: N fitted items, B batch, L levels, K codes, D latent width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.errors import TrainingError
from genrec.runtime import progress
from genrec.tokenizers.quantization.codebooks import (
    Cluster,
    MovingAverages,
    Usage,
    kmeans_codebooks,
    plain_clusters,
)
from genrec.tokenizers.quantization.kmeans import Clusters
from genrec.tokenizers.quantization.residual import (
    Quantized,
    balanced_code,
    info_nce,
    quantization_loss,
    residual_quantize,
)

if TYPE_CHECKING:
    from genrec.tokenizers.rqvae import RQVAE

ENCODE_CHUNK = 16_384
HISTORY = ("loss", "reconstruction", "codebook", "commitment")


class Network(nn.Module):
    """Encoder, codebooks (L, K, D) and decoder."""

    def __init__(self, width: int, config: RQVAE.Config) -> None:
        super().__init__()
        widths = (width, *config.hidden_dims, config.latent_dim)
        self.width = width
        self.distance = config.distance
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        shape = (config.num_levels, config.codebook_size, config.latent_dim)
        self.codebooks = nn.Parameter(torch.randn(shape) * config.latent_dim**-0.5)

    @torch.no_grad()
    def quantize(self, inputs_BE: Tensor) -> Quantized:
        """Return codes and residuals of inputs, nearest code at every level."""
        return residual_quantize(self.encoder(inputs_BE), self.codebooks, distance=self.distance)

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Return the decoder's output (B, E) for codes."""
        chosen = [book[codes_BL[:, level]] for level, book in enumerate(self.codebooks)]
        result: Tensor = self.decoder(torch.stack(chosen).sum(dim=0))
        return result


class Objective:
    """What a training step of an RQ-VAE minimises; a subclass adds terms of its own.

    Args:
        network: on the device of the inputs.
        config: see `RQVAE.Config`.
    """

    extra_names: tuple[str, ...] = ()
    """Names in the history of what `extra` returns."""

    def __init__(self, network: Network, config: RQVAE.Config) -> None:
        self.network = network
        self.config = config
        balanced = partial(
            balanced_code,
            epsilon=config.sinkhorn_epsilon,
            num_iterations=config.sinkhorn_iterations,
            distance=config.distance,
        )
        self._assign_last = balanced if config.last_level == "sinkhorn" else None

    @classmethod
    def names(cls, config: RQVAE.Config) -> tuple[str, ...]:
        """Return the names of the parts, in the order of `losses`."""
        contrastive = ("contrastive",) if config.contrastive_weight > 0 else ()
        return (*HISTORY, *contrastive, *cls.extra_names)

    def start_epoch(self) -> None:
        """Do what is done once before each pass over the items."""

    def cluster(self, points_ND: np.ndarray, num_codes: int, seed: int) -> Clusters:
        """Return the first code vectors of a level, and the label of each point."""
        return plain_clusters(points_ND, num_codes, seed)

    def extra(
        self, quantized: Quantized, codebooks_LKD: Tensor, rows_B: Tensor
    ) -> list[tuple[float, Tensor]]:
        """Return (weight, term) for each of `extra_names`."""
        return []

    def losses(self, batch_BE: Tensor, rows_B: Tensor) -> tuple[Tensor, Quantized]:
        """Return the loss followed by its unweighted parts (see `names`), and the codes.

        Args:
            batch_BE: inputs.
            rows_B: their places among all inputs.
        """
        config, network = self.config, self.network
        quantized = residual_quantize(
            network.encoder(batch_BE),
            network.codebooks,
            estimator=config.gradient,
            residual_grad=config.residual_grad,
            distance=config.distance,
            assign_last=self._assign_last,
        )
        output_BE = network.decoder(quantized.vectors_BD)
        error = F.mse_loss(output_BE, batch_BE, reduction="sum") / len(batch_BE)
        weight = config.contrastive_weight
        terms = [(1.0 - weight, error)]
        parts = [error, quantized.codebook_L.sum(), quantized.commitment_L.sum()]
        if weight > 0:
            terms.append((weight, self._contrast(output_BE, batch_BE)))
        terms += self.extra(quantized, network.codebooks, rows_B)
        parts += [term for _, term in terms[1:]]
        loss = quantization_loss(
            quantized,
            commitment=config.commitment,
            reduce=config.level_reduce,
            train_codebooks=config.codebook_update == "gradient",
        )
        for factor, term in terms:
            loss = loss + factor * term
        return torch.stack([loss, *parts]), quantized

    def _contrast(self, output_BE: Tensor, batch_BE: Tensor) -> Tensor:
        """Contrastive reconstruction (CoST): find the input among those of the batch."""
        temperature = self.config.contrastive_temperature
        return info_nce(output_BE, batch_BE, temperature=temperature, cosine=True)


def train(
    network: Network,
    inputs_NE: Tensor,
    config: RQVAE.Config,
    objective: Objective | None = None,
) -> dict[str, list[float]]:
    """Train a network in place; return the mean of each part of the loss per epoch.

    Args:
        network: on the device of the inputs.
        inputs_NE: all items.
        config: see `RQVAE.Config`.
        objective: what to minimise; default the RQ-VAE's own losses.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    objective = objective or Objective(network, config)
    rng = np.random.default_rng(config.seed)
    if config.kmeans_init:
        initialise_codebooks(network, inputs_NE, config, objective.cluster)
    num_batches = -(-len(inputs_NE) // config.batch_size)
    step = _Step(network, config, objective, rng, num_batches * config.num_epochs)
    names = objective.names(config)
    history: dict[str, list[float]] = {name: [] for name in names}
    with progress(f"{config.name} epochs", config.num_epochs) as advance:
        for _ in range(config.num_epochs):
            objective.start_epoch()
            totals = torch.zeros(len(names), device=inputs_NE.device)
            for rows in _batches(len(inputs_NE), num_batches, rng):
                rows_B = torch.from_numpy(rows).to(inputs_NE.device)
                totals += step(inputs_NE.index_select(0, rows_B), rows_B) * len(rows)
            _record(history, (totals / len(inputs_NE)).tolist())
            advance(1)
    return history


@torch.no_grad()
def initialise_codebooks(
    network: Network,
    inputs_NE: Tensor,
    config: RQVAE.Config,
    cluster: Cluster = plain_clusters,
) -> None:
    """Put the codebooks of all levels on k-means centroids of the residuals of all items."""
    latents = [network.encoder(part).cpu() for part in inputs_NE.split(ENCODE_CHUNK)]
    codebooks = kmeans_codebooks(torch.cat(latents).numpy(), config, cluster)
    network.codebooks.copy_(torch.from_numpy(codebooks))


class _Step:
    """One step: gradients, moving averages, unused codes; and what these remember."""

    def __init__(
        self,
        network: Network,
        config: RQVAE.Config,
        objective: Objective,
        rng: np.random.Generator,
        num_steps: int,
    ) -> None:
        follows = config.codebook_update == "ema"
        network.codebooks.requires_grad_(not follows)
        self.objective = objective
        self.optimizer = _optimizer(network, config)
        self.usage = Usage(network.codebooks, config, rng)
        self.averages = MovingAverages(network.codebooks, config) if follows else None
        self.done, self.num_steps = 0, num_steps

    def __call__(self, batch_BE: Tensor, rows_B: Tensor) -> Tensor:
        """Return the parts of the loss before the step."""
        parts, quantized = self.objective.losses(batch_BE, rows_B)
        self.optimizer.zero_grad(set_to_none=True)
        parts[0].backward()
        self.optimizer.step()
        self.done += 1
        codes_LB = quantized.codes_BL.T
        self.usage.update(codes_LB)
        if self.averages is not None:
            self.averages.update(codes_LB, quantized.residuals_LBD)
        if self.usage.is_due(self.done, self.num_steps):
            self.usage.move_dead_codes(quantized, self.optimizer, self.averages)
        return parts.detach()


def _optimizer(network: Network, config: RQVAE.Config) -> torch.optim.AdamW:
    weights = [p for p in network.parameters() if p is not network.codebooks]
    groups = [{"params": weights, "weight_decay": config.weight_decay}]
    if network.codebooks.requires_grad:
        groups.append({"params": [network.codebooks], "weight_decay": 0.0})
    # Fused: one pass over the weights; the default's eight cost a third of a small batch's step.
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _batches(num_items: int, num_batches: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return a random partition of the rows; sizes differ by at most one."""
    return np.array_split(rng.permutation(num_items), num_batches)


def _record(history: dict[str, list[float]], values: Sequence[float]) -> None:
    if not np.isfinite(values).all():
        epoch = len(history["loss"]) + 1
        raise TrainingError(
            f"tokenizer: the loss is {values[0]} in epoch {epoch}. Set tokenizer.normalize=true or "
            "a smaller tokenizer.learning_rate."
        )
    for name, value in zip(history, values, strict=True):
        history[name].append(value)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])
