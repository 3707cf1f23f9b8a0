"""How codebooks move other than by gradients: k-means start, moving averages, unused codes.

It sees codes and residuals, never the encoder or the loss (`rqvae_training.py`).

Shapes: N items, B batch, L levels, K codes, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.tokenizers.base import unit_length
from genrec.tokenizers.quantization.kmeans import Clusters, kmeans, minibatch_kmeans
from genrec.tokenizers.quantization.residual import Quantized, nearest_code

if TYPE_CHECKING:
    from genrec.tokenizers.rqvae import RQVAE

LLOYD_ITEMS = 50_000
"""Above this many items k-means goes through them in mini-batches; all of them either way."""
KMEANS_ITERATIONS = 10

Cluster = Callable[[np.ndarray, int, int], Clusters]
"""From points (N, D), the number of codes and a seed to centroids and labels."""


def plain_clusters(points_ND: np.ndarray, num_codes: int, seed: int) -> Clusters:
    """Cluster all points: Lloyd's iterations, by mini-batches above `LLOYD_ITEMS` points."""
    method = kmeans if len(points_ND) <= LLOYD_ITEMS else minibatch_kmeans
    return method(points_ND, num_codes, num_iterations=KMEANS_ITERATIONS, seed=seed)


def kmeans_codebooks(
    latents_ND: np.ndarray, config: RQVAE.Config, cluster: Cluster = plain_clusters
) -> np.ndarray:
    """Return codebooks (L, K, D) float32: k-means centroids of the residuals, level by level.

    For the cosine distance directions are clustered, and a code is the mean of its residuals (not
    of their directions), so that subtracting it takes away as much as it can.

    Args:
        latents_ND: of all items, float32.
        config: number of levels and codes, distance, seed.
        cluster: the clustering of one level.
    """
    residuals = latents_ND
    codebooks = []
    for level in range(config.num_levels):
        cosine = config.distance == "cosine"
        points = unit_length(residuals) if cosine else residuals
        codebook, labels = cluster(points, config.codebook_size, config.seed + level)
        if cosine:
            codebook = _means(residuals, labels, codebook)
        codebooks.append(codebook)
        residuals = residuals - codebook[_nearest(residuals, codebook, config)]
    return np.stack(codebooks)


def _nearest(residuals_ND: np.ndarray, codebook_KD: np.ndarray, config: RQVAE.Config) -> np.ndarray:
    book = torch.from_numpy(codebook_KD)
    parts = torch.from_numpy(residuals_ND).split(LLOYD_ITEMS)
    assign = partial(nearest_code, distance=config.distance)
    return torch.cat([assign(part, book) for part in parts]).numpy()


def _means(residuals_ND: np.ndarray, labels_N: np.ndarray, otherwise_KD: np.ndarray) -> np.ndarray:
    sums = np.zeros_like(otherwise_KD)
    np.add.at(sums, labels_N, residuals_ND)
    counts = np.bincount(labels_N, minlength=len(sums))[:, None].astype(np.float32)
    return np.divide(sums, counts, out=otherwise_KD.copy(), where=counts > 0)


class MovingAverages:
    """Codebooks that are running means of their residuals (van den Oord et al. 2017, appendix).

    With n residuals of sum s assigned to a code in a batch: N <- g N + (1 - g) n,
    m <- g m + (1 - g) s, e = m / N', where N' = (N + eps) / (sum N + K eps) * sum N is Laplace
    smoothing (Razavi et al. 2019). N starts at B / K, and m at N e.

    Args:
        codebooks_LKD: changed in place.
        config: `ema_decay` g, `ema_smoothing` eps and `batch_size` B.
    """

    def __init__(self, codebooks_LKD: Tensor, config: RQVAE.Config) -> None:
        self.codebooks_LKD = codebooks_LKD.detach()
        self.decay, self.smoothing = config.ema_decay, config.ema_smoothing
        self.start = config.batch_size / config.codebook_size
        self.counts_LK = torch.full_like(self.codebooks_LKD[..., 0], self.start)
        self.sums_LKD = self.codebooks_LKD * self.start

    def update(self, codes_LB: Tensor, residuals_LBD: Tensor) -> None:
        """Take one batch into the averages and set every code vector."""
        num_codes = self.codebooks_LKD.shape[1]
        one_hot_LKB = F.one_hot(codes_LB, num_codes).mT.to(residuals_LBD.dtype)
        new = 1.0 - self.decay
        self.counts_LK.mul_(self.decay).add_(one_hot_LKB.sum(dim=2), alpha=new)
        self.sums_LKD.mul_(self.decay).add_(one_hot_LKB @ residuals_LBD, alpha=new)
        total_L1 = self.counts_LK.sum(dim=1, keepdim=True)
        smoothed_LK = (self.counts_LK + self.smoothing) * (
            total_L1 / (total_L1 + num_codes * self.smoothing)
        )
        self.codebooks_LKD.copy_(self.sums_LKD / smoothed_LK[..., None])

    def restart(self, level: int, codes: Tensor) -> None:
        """Make codes that were moved as heavy as at the start, where they are now."""
        self.counts_LK[level, codes] = self.start
        self.sums_LKD[level, codes] = self.codebooks_LKD[level, codes] * self.start


class Usage:
    """Running share of the items that each code gets, and the moves of codes that get none."""

    def __init__(
        self, codebooks_LKD: torch.nn.Parameter, config: RQVAE.Config, rng: np.random.Generator
    ) -> None:
        self.codebooks = codebooks_LKD
        self.config = config
        self.rng = rng
        self.share_LK = torch.full(
            codebooks_LKD.shape[:2], 1.0 / config.codebook_size, device=codebooks_LKD.device
        )

    def update(self, codes_LB: Tensor) -> None:
        """Take one batch into the running shares."""
        counts_LK = torch.zeros_like(self.share_LK)
        counts_LK.scatter_add_(1, codes_LB, torch.ones_like(codes_LB, dtype=counts_LK.dtype))
        decay = self.config.usage_decay
        self.share_LK.mul_(decay).add_(counts_LK, alpha=(1.0 - decay) / codes_LB.shape[1])

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether unused codes move after this step (never in the last tenth)."""
        every = self.config.dead_code_every
        return every > 0 and step % every == 0 and step <= 0.9 * num_steps

    @torch.no_grad()
    def move_dead_codes(
        self,
        quantized: Quantized,
        optimizer: torch.optim.Optimizer,
        averages: MovingAverages | None = None,
    ) -> None:
        """Move unused codes onto random residuals of their level; forget their past.

        Their past is the optimiser's state, or their moving averages.
        """
        uniform = 1.0 / self.config.codebook_size
        dead_LK = (self.share_LK < self.config.dead_code_share * uniform).cpu()
        for level in dead_LK.any(dim=1).nonzero()[:, 0].tolist():
            residuals_BD = quantized.residuals_LBD[level]
            dead = dead_LK[level].nonzero()[:, 0].to(residuals_BD.device)[: len(residuals_BD)]
            rows = self.rng.permutation(len(residuals_BD))[: len(dead)]
            self.codebooks[level, dead] = residuals_BD[torch.from_numpy(rows).to(dead.device)]
            self.share_LK[level, dead] = uniform
            if averages is not None:
                averages.restart(level, dead)
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[self.codebooks][name][level, dead] = 0.0
