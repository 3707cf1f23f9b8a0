"""What LETTER minimises beside the losses of its RQ-VAE: alignment and diversity.

Alignment: the quantised latent finds its item's collaborative vector among those of the batch.
Diversity: code vectors of a level stay close within groups and apart between them. The training
loop is the RQ-VAE's (`rqvae_training.py`); where collaborative vectors come from is not known here.

Shapes: N fitted items, B batch, L levels, K codes, G groups, D latent width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.tokenizers.quantization.codebooks import KMEANS_ITERATIONS, LLOYD_ITEMS, plain_clusters
from genrec.tokenizers.quantization.constrained_kmeans import constrained_kmeans
from genrec.tokenizers.quantization.kmeans import Clusters
from genrec.tokenizers.quantization.residual import Quantized, chosen_vectors, info_nce, reduced
from genrec.tokenizers.quantization.rqvae_training import Network, Objective

if TYPE_CHECKING:
    from genrec.tokenizers.letter import LETTER

SMALLEST_GROUP, LARGEST_GROUP = 10, 60
"""Bounds on the codes of a group (LETTER's code), where the number of codes admits them."""
SMALLEST_CLUSTER = 10
"""A first cluster has at least this many items, or N / (2 K) (LETTER's code)."""
GROUP_ITERATIONS = 10


class LetterObjective(Objective):
    """The RQ-VAE's losses, collaborative alignment and diversity.

    Args:
        network: on the device of the inputs.
        config: see `LETTER.Config`.
        targets_ND: float32 collaborative vectors in the order of the inputs; an item with zeros
            takes no part in the alignment.
    """

    extra_names = ("alignment", "diversity")
    config: LETTER.Config

    def __init__(self, network: Network, config: LETTER.Config, targets_ND: np.ndarray) -> None:
        super().__init__(network, config)
        device = network.codebooks.device
        self.targets_ND = torch.from_numpy(targets_ND).to(device)
        self.has_target_N = self.targets_ND.any(dim=1)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.groups: CodeGroups | None = None

    def start_epoch(self) -> None:
        """Group the code vectors of every level anew."""
        num_codes = self.config.codebook_size
        if self.config.beta > 0 and num_codes > 1:
            self.groups = CodeGroups.of(
                self.network.codebooks.detach().cpu().numpy(),
                min(self.config.num_groups, num_codes // 2),
                seed=self.config.seed,
                before=self.groups,
                device=self.targets_ND.device,
            )

    def cluster(self, points_ND: np.ndarray, num_codes: int, seed: int) -> Clusters:
        """Return first code vectors with at least min(10, N / (2 K)) items each."""
        smallest = min(SMALLEST_CLUSTER, len(points_ND) // (2 * num_codes))
        if not (self.config.constrained_init and smallest) or len(points_ND) > LLOYD_ITEMS:
            return plain_clusters(points_ND, num_codes, seed)
        return constrained_kmeans(
            points_ND,
            num_codes,
            smallest=smallest,
            largest=len(points_ND),
            num_iterations=KMEANS_ITERATIONS,
            seed=seed,
        )

    def extra(
        self, quantized: Quantized, codebooks_LKD: Tensor, rows_B: Tensor
    ) -> list[tuple[float, Tensor]]:
        """Return the weighted alignment and diversity losses."""
        zero = codebooks_LKD.new_zeros(())
        alignment = diversity = zero
        if self.config.alpha > 0:
            alignment = self._alignment(quantized.vectors_BD, rows_B)
        if self.groups is not None:
            codes_LB = quantized.codes_BL.T
            draws_LB = torch.rand(codes_LB.shape, generator=self.generator).to(codes_LB.device)
            positives_LB = self.groups.positives(codes_LB, draws_LB)
            each_L = diversity_loss(codebooks_LKD, codes_LB, positives_LB)
            diversity = reduced(each_L, self.config.level_reduce)
        return [(self.config.alpha, alignment), (self.config.beta, diversity)]

    def _alignment(self, vectors_BD: Tensor, rows_B: Tensor) -> Tensor:
        """Return the InfoNCE between quantised latents and collaborative vectors."""
        known_B = self.has_target_N.index_select(0, rows_B).nonzero()[:, 0]
        if len(known_B) < 2:
            return vectors_BD.new_zeros(())
        targets_BD = self.targets_ND.index_select(0, rows_B.index_select(0, known_B))
        return info_nce(vectors_BD.index_select(0, known_B), targets_BD)


class CodeGroups:
    """Groups of the code vectors of every level, and draws of another code of the same group.

    Args:
        labels_LK: group of each code; every group has two codes or more.
        centroids_LGD: means of the groups.
        device: where codes will lie.
    """

    def __init__(
        self, labels_LK: np.ndarray, centroids_LGD: np.ndarray, device: torch.device | None = None
    ) -> None:
        self.centroids_LGD = centroids_LGD
        order = np.argsort(labels_LK, axis=1, kind="stable")
        sizes = np.stack([np.bincount(labels)[labels] for labels in labels_LK])
        firsts = np.stack(
            [np.searchsorted(labels[o], labels) for labels, o in zip(labels_LK, order, strict=True)]
        )
        places = np.argsort(order, axis=1) - firsts
        self.order_LK, self.sizes_LK, self.firsts_LK, self.places_LK = (
            torch.from_numpy(table).to(device) for table in (order, sizes, firsts, places)
        )

    @classmethod
    def of(
        cls,
        codebooks_LKD: np.ndarray,
        num_groups: int,
        *,
        seed: int,
        before: CodeGroups | None = None,
        device: torch.device | None = None,
    ) -> CodeGroups:
        """Cluster each level's code vectors into groups of bounded size.

        Args:
            codebooks_LKD: float32.
            num_groups: at most K / 2.
            seed: of the first centroids.
            before: an earlier grouping to start from.
            device: where codes will lie.
        """
        num_codes = codebooks_LKD.shape[1]
        smallest = max(2, min(SMALLEST_GROUP, num_codes // (2 * num_groups)))
        largest = max(LARGEST_GROUP, 2 * -(-num_codes // num_groups))
        clusters = [
            constrained_kmeans(
                book_KD,
                num_groups,
                smallest=smallest,
                largest=largest,
                num_iterations=GROUP_ITERATIONS,
                seed=seed + level,
                start_KD=before.centroids_LGD[level] if before is not None else None,
            )
            for level, book_KD in enumerate(codebooks_LKD)
        ]
        return cls(
            np.stack([c.labels for c in clusters]),
            np.stack([c.centroids for c in clusters]),
            device,
        )

    def positives(self, codes_LB: Tensor, draws_LB: Tensor) -> Tensor:
        """Return another code (L, B) of each code's group, by draws from [0, 1)."""
        places, firsts, sizes = (
            table.gather(1, codes_LB) for table in (self.places_LK, self.firsts_LK, self.sizes_LK)
        )
        shift = 1 + (draws_LB * (sizes - 1)).long()
        return self.order_LK.gather(1, firsts + (places + shift) % sizes)


def diversity_loss(codebooks_LKD: Tensor, codes_LB: Tensor, positives_LB: Tensor) -> Tensor:
    """Return -log(exp<e_c, e_c+> / sum over j != c of exp<e_c, e_j>) per level, batch means (L,).

    c is an item's code and c+ another code of its group. The vectors are the codebook's own, so
    the gradient moves them (LETTER, equation of the diversity loss).
    """
    chosen_LBD = chosen_vectors(codes_LB, codebooks_LKD)
    scores_LBK = chosen_LBD @ codebooks_LKD.mT
    scores_LBK = scores_LBK.scatter(2, codes_LB[..., None], -torch.inf)
    losses = F.cross_entropy(scores_LBK.flatten(0, 1), positives_LB.flatten(), reduction="none")
    return losses.view(codes_LB.shape).mean(dim=1)
