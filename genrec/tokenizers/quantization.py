"""Residual quantization as differentiable functions: assignment, gradient estimators, losses.

Functions of tensors only. Where the encoder comes from and how the codebooks are updated is in
`rqvae.py`.

Shapes: B vectors of a batch, L levels, K codes, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GradientEstimator = Literal["straight_through", "rotation"]
ResidualGrad = Literal["detached_code", "ste"]
LevelReduce = Literal["sum", "mean"]
Assign = Callable[[Tensor, Tensor], Tensor]
"""From residuals (B, D) and a codebook (K, D) to codes (B,)."""


@dataclass(frozen=True)
class Quantized:
    """Result of a residual quantization."""

    codes_BL: Tensor
    """int64 codes."""
    vectors_BD: Tensor
    """Sum of the chosen code vectors; its gradient reaches the encoder by the estimator."""
    codebook_L: Tensor
    """Codebook loss per level, ||sg(r) - e||^2, mean over the batch."""
    commitment_L: Tensor
    """Commitment loss per level, ||r - sg(e)||^2, mean over the batch."""
    residuals: list[Tensor]
    """Residual (B, D) that each level quantised, detached."""


def residual_quantize(
    latents_BD: Tensor,
    codebooks_LKD: Tensor,
    *,
    estimator: GradientEstimator = "straight_through",
    residual_grad: ResidualGrad = "detached_code",
    assign_last: Assign | None = None,
) -> Quantized:
    """Quantise latents level by level.

    Args:
        latents_BD: encoder outputs.
        codebooks_LKD: code vectors.
        estimator: how the gradient passes from the quantised vectors to the latents.
        residual_grad: what is subtracted to get the next residual. "detached_code" subtracts
            sg(e), so that the commitment of every level trains the encoder. "ste" subtracts the
            straight-through value r + sg(e - r) as LC-Rec, LETTER and ports of TIGER do: then the
            next residual is sg(r - e) and only the first level's commitment trains it.
        assign_last: how the last level chooses codes; default the nearest.
    """
    residual = latents_BD
    codes, chosen, codebook_losses, commitments, residuals = [], [], [], [], []
    last = len(codebooks_LKD) - 1
    for level, codebook_KD in enumerate(codebooks_LKD):
        assign = assign_last if level == last and assign_last is not None else nearest_code
        residuals.append(residual.detach())
        code_B = assign(residual.detach(), codebook_KD.detach())
        vector_BD = F.embedding(code_B, codebook_KD)
        codebook_losses.append(_squared(residual.detach() - vector_BD))
        commitments.append(_squared(residual - vector_BD.detach()))
        codes.append(code_B)
        chosen.append(vector_BD.detach())
        if residual_grad == "ste":
            residual = residual - straight_through(residual, vector_BD)
        else:
            residual = residual - vector_BD.detach()
    total_BD = torch.stack(chosen).sum(dim=0)
    estimate = rotate if estimator == "rotation" else straight_through
    return Quantized(
        torch.stack(codes, dim=1),
        estimate(latents_BD, total_BD),
        torch.stack(codebook_losses),
        torch.stack(commitments),
        residuals,
    )


def quantization_loss(
    quantized: Quantized, *, commitment: float, reduce: LevelReduce = "sum"
) -> Tensor:
    """Return codebook + commitment * commitment loss, summed (TIGER) or averaged over levels."""
    per_level = quantized.codebook_L + commitment * quantized.commitment_L
    return per_level.sum() if reduce == "sum" else per_level.mean()


def nearest_code(residuals_BD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Return the code (B,) of the nearest code vector; the lowest of equally near ones."""
    return code_distances(residuals_BD, codebook_KD).argmin(dim=1)


def code_distances(residuals_BD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Return squared distances (B, K)."""
    squares_K = codebook_KD.square().sum(dim=1)
    squares_B = residuals_BD.square().sum(dim=1, keepdim=True)
    return torch.addmm(squares_K, residuals_BD, codebook_KD.T, alpha=-2.0) + squares_B


def straight_through(latents_BD: Tensor, vectors_BD: Tensor) -> Tensor:
    """Return `vectors_BD`, with the gradient of the identity on `latents_BD`."""
    return latents_BD + (vectors_BD - latents_BD).detach()


def rotate(latents_BD: Tensor, vectors_BD: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return `vectors_BD`, with the gradient of the rotation and rescaling that leads there.

    The rotation trick (Fifty et al. 2024): q = (||q|| / ||e||) R e with
    R = I - 2 r r^T + 2 q^ e^^T and r = (e^ + q^) / ||e^ + q^||, all but the last e held constant.
    Where e and q are zero or point in opposite directions R is not defined; there the gradient is
    straight-through. Nearly opposite directions amplify rounding (by 1 / ||e^ + q^||); the value
    returned is therefore q itself, and only the gradient comes from the rotation.
    """
    e, q = latents_BD.detach(), vectors_BD.detach()
    norm_e, norm_q = e.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    unit_e, unit_q = e / norm_e.clamp_min(eps), q / norm_q.clamp_min(eps)
    middle = unit_e + unit_q
    length = middle.norm(dim=1, keepdim=True)
    r = middle / length.clamp_min(eps)
    along_r = (latents_BD * r).sum(dim=1, keepdim=True)
    along_e = (latents_BD * unit_e).sum(dim=1, keepdim=True)
    rotated = latents_BD - 2.0 * along_r * r + 2.0 * along_e * unit_q
    rotated = rotated * (norm_q / norm_e.clamp_min(eps))
    rotated = rotated + (q - rotated.detach())
    defined = (length > 1e-3) & (norm_e > eps) & (norm_q > eps)
    return torch.where(defined, rotated, straight_through(latents_BD, vectors_BD))


def sinkhorn(
    distances_BK: Tensor, *, epsilon: float, num_iterations: int, tolerance: float = 1e-3
) -> Tensor:
    """Return a balanced assignment plan (B, K): rows sum to 1 / B, columns to about 1 / K.

    Uniform semantic mapping (LC-Rec): distances are mapped to [-1, 1] by centre and half-range,
    Q = exp(-d / epsilon), then columns and rows are normalised in turn; in the log domain and in
    float64, because epsilon = 0.003 spans exp(+-333).

    Args:
        distances_BK: squared distances.
        epsilon: temperature; small is sharp and slow to converge.
        num_iterations: upper bound. LC-Rec's 50 leave columns some 15% off at epsilon = 0.003.
        tolerance: stop when every column sum is within this part of 1 / K.
    """
    d = distances_BK.double()
    low, high = d.min(), d.max()
    half_range = ((high - low) / 2).clamp_min(1e-12)
    log_q = -((d - (low + high) / 2) / half_range) / epsilon
    log_b, log_k = (torch.tensor(float(n), dtype=d.dtype).log() for n in d.shape)
    for iteration in range(num_iterations):
        excess_K = torch.logsumexp(log_q, dim=0, keepdim=True) + log_k
        if iteration > 0 and excess_K.abs().max() < tolerance:
            break
        log_q = log_q - excess_K
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True) - log_b
    return log_q.exp()


def balanced_code(
    residuals_BD: Tensor, codebook_KD: Tensor, *, epsilon: float, num_iterations: int
) -> Tensor:
    """Return the code (B,) with the largest share of each row of the Sinkhorn plan."""
    distances = code_distances(residuals_BD, codebook_KD)
    return sinkhorn(distances, epsilon=epsilon, num_iterations=num_iterations).argmax(dim=1)


def _squared(difference_BD: Tensor) -> Tensor:
    return difference_BD.square().sum(dim=1).mean()
