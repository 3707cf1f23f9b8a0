"""How an RQ-VAE learns: its network, its loss, its training loop, its unused codes.

The whole catalogue stays on the device and there is no data loader: a step costs little more than
its matrix products. What a tokenizer offers to the outside is in `rqvae.py`.

Shapes: N fitted items, B batch, L levels, K codes, D latent width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from genrec.errors import TrainingError
from genrec.runtime import progress
from genrec.tokenizers.kmeans import kmeans
from genrec.tokenizers.quantization import (
    Quantized,
    balanced_code,
    quantization_loss,
    residual_quantize,
)

if TYPE_CHECKING:
    from genrec.tokenizers.rqvae import RQVAE

KMEANS_ITEMS = 50_000
KMEANS_ITERATIONS = 10
HISTORY = ("loss", "reconstruction", "codebook", "commitment")


class Network(nn.Module):
    """Encoder, codebooks (L, K, D) and decoder."""

    def __init__(self, width: int, config: RQVAE.Config) -> None:
        super().__init__()
        widths = (width, *config.hidden_dims, config.latent_dim)
        self.width = width
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        shape = (config.num_levels, config.codebook_size, config.latent_dim)
        self.codebooks = nn.Parameter(torch.randn(shape) * config.latent_dim**-0.5)

    @torch.no_grad()
    def quantize(self, inputs_BE: Tensor) -> Quantized:
        """Return codes and residuals of inputs, nearest code at every level."""
        return residual_quantize(self.encoder(inputs_BE), self.codebooks)

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Return the decoder's output (B, E) for codes."""
        chosen = [book[codes_BL[:, level]] for level, book in enumerate(self.codebooks)]
        result: Tensor = self.decoder(torch.stack(chosen).sum(dim=0))
        return result


def train(network: Network, inputs_NE: Tensor, config: RQVAE.Config) -> dict[str, list[float]]:
    """Train a network in place; return the history of losses.

    Args:
        network: on the device of the inputs.
        inputs_NE: all items.
        config: see `RQVAE.Config`.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    rng = np.random.default_rng(config.seed)
    if config.kmeans_init:
        initialise_codebooks(network, inputs_NE, config.seed)
    optimizer = _optimizer(network, config)
    num_batches = -(-len(inputs_NE) // config.batch_size)
    num_steps = config.num_epochs * num_batches
    usage = Usage(network, config, rng)
    history: dict[str, list[float]] = {name: [] for name in HISTORY}
    step = 0
    with progress("RQ-VAE epochs", config.num_epochs) as advance:
        for _ in range(config.num_epochs):
            totals = torch.zeros(len(HISTORY), device=inputs_NE.device)
            for rows in _batches(len(inputs_NE), num_batches, rng):
                batch_BE = inputs_NE[torch.from_numpy(rows).to(inputs_NE.device)]
                parts, quantized = losses(network, batch_BE, config)
                optimizer.zero_grad(set_to_none=True)
                parts[0].backward()
                optimizer.step()
                totals += parts.detach() * len(rows)
                step += 1
                usage.update(quantized.codes_BL)
                if usage.is_due(step, num_steps):
                    usage.move_dead_codes(quantized, optimizer)
            _record(history, (totals / len(inputs_NE)).tolist())
            advance(1)
    return history


def losses(network: Network, batch_BE: Tensor, config: RQVAE.Config) -> tuple[Tensor, Quantized]:
    """Return (loss, reconstruction, codebook, commitment), the parts unweighted, and the codes."""
    balanced = partial(
        balanced_code,
        epsilon=config.sinkhorn_epsilon,
        num_iterations=config.sinkhorn_iterations,
    )
    quantized = residual_quantize(
        network.encoder(batch_BE),
        network.codebooks,
        estimator=config.gradient,
        residual_grad=config.residual_grad,
        assign_last=balanced if config.last_level == "sinkhorn" else None,
    )
    output_BE = network.decoder(quantized.vectors_BD)
    reconstruction = (output_BE - batch_BE).square().sum(dim=1).mean()
    loss = reconstruction + quantization_loss(
        quantized, commitment=config.commitment, reduce=config.level_reduce
    )
    parts = (loss, reconstruction, quantized.codebook_L.sum(), quantized.commitment_L.sum())
    return torch.stack(parts), quantized


@torch.no_grad()
def initialise_codebooks(network: Network, inputs_NE: Tensor, seed: int) -> None:
    """Put the codebooks of all levels on k-means centroids of the encoder's residuals."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(inputs_NE))[:KMEANS_ITEMS]
    chosen_NE = inputs_NE[torch.from_numpy(np.sort(rows)).to(inputs_NE.device)]
    residuals = network.encoder(chosen_NE).cpu().numpy()
    for level, codebook_KD in enumerate(network.codebooks):
        centroids, labels = kmeans(
            residuals, len(codebook_KD), num_iterations=KMEANS_ITERATIONS, seed=seed + level
        )
        codebook_KD.copy_(torch.from_numpy(centroids))
        residuals = residuals - centroids[labels]


class Usage:
    """Running share of the items that each code gets, and the moves of codes that get none."""

    def __init__(self, network: Network, config: RQVAE.Config, rng: np.random.Generator) -> None:
        self.codebooks = network.codebooks
        self.config = config
        self.rng = rng
        self.share_LK = torch.full(
            self.codebooks.shape[:2], 1.0 / config.codebook_size, device=self.codebooks.device
        )

    def update(self, codes_BL: Tensor) -> None:
        """Take one batch into the running shares."""
        counts_LK = torch.zeros_like(self.share_LK)
        ones = torch.ones_like(codes_BL.T, dtype=counts_LK.dtype)
        counts_LK.scatter_add_(1, codes_BL.T.contiguous(), ones)
        decay = self.config.usage_decay
        self.share_LK.mul_(decay).add_(counts_LK, alpha=(1.0 - decay) / len(codes_BL))

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether unused codes move after this step (never in the last tenth)."""
        every = self.config.dead_code_every
        return every > 0 and step % every == 0 and step <= 0.9 * num_steps

    @torch.no_grad()
    def move_dead_codes(self, quantized: Quantized, optimizer: torch.optim.Optimizer) -> None:
        """Move unused codes onto random residuals of their level; forget their optimiser state."""
        uniform = 1.0 / self.config.codebook_size
        dead_LK = (self.share_LK < self.config.dead_code_share * uniform).cpu()
        for level in dead_LK.any(dim=1).nonzero()[:, 0].tolist():
            residuals_BD = quantized.residuals[level]
            dead = dead_LK[level].nonzero()[:, 0].to(residuals_BD.device)[: len(residuals_BD)]
            rows = self.rng.permutation(len(residuals_BD))[: len(dead)]
            self.codebooks[level, dead] = residuals_BD[torch.from_numpy(rows).to(dead.device)]
            self.share_LK[level, dead] = uniform
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[self.codebooks][name][level, dead] = 0.0


def _optimizer(network: Network, config: RQVAE.Config) -> torch.optim.AdamW:
    weights = [p for p in network.parameters() if p is not network.codebooks]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": [network.codebooks], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _batches(num_items: int, num_batches: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return a random partition of the rows; sizes differ by at most one."""
    return np.array_split(rng.permutation(num_items), num_batches)


def _record(history: dict[str, list[float]], values: Sequence[float]) -> None:
    if not np.isfinite(values).all():
        epoch = len(history["loss"]) + 1
        raise TrainingError(
            f"RQ-VAE: the loss is {values[0]} in epoch {epoch}. Set tokenizer.normalize=true or a "
            "smaller tokenizer.learning_rate."
        )
    for name, value in zip(HISTORY, values, strict=True):
        history[name].append(value)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
