"""Residual quantization as differentiable functions: assignment, gradient estimators, losses.

Functions of tensors only. Where the encoder comes from is in `rqvae_training.py`, how codebooks
move other than by gradients in `codebooks.py`.

Shapes: B vectors of a batch, L levels, K codes, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GradientEstimator = Literal["straight_through", "rotation"]
ResidualGrad = Literal["detached_code", "ste"]
LevelReduce = Literal["sum", "mean"]
Distance = Literal["l2", "cosine"]
Assign = Callable[[Tensor, Tensor], Tensor]
"""From residuals (B, D) and a codebook (K, D) to codes (B,)."""

ABSORB_ABOVE = 1e100
"""Sinkhorn's scaling factors move into the exponent when they leave [1 / this, this]. An iteration
changes them by B or K at most, so looking every `CHECK_EVERY` iterations is soon enough."""
CHECK_EVERY = 10


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
    residuals_LBD: Tensor
    """The residual that each level quantised, detached."""


def residual_quantize(
    latents_BD: Tensor,
    codebooks_LKD: Tensor,
    *,
    estimator: GradientEstimator = "straight_through",
    residual_grad: ResidualGrad = "detached_code",
    distance: Distance = "l2",
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
        distance: what "nearest" means; whole code vectors are subtracted with either.
        assign_last: how the last level chooses codes; default the nearest.
    """
    codes_LB, residuals_LBD = assign_codes(
        latents_BD.detach(), codebooks_LKD.detach(), distance=distance, assign_last=assign_last
    )
    chosen_LBD = chosen_vectors(codes_LB, codebooks_LKD)
    constant_LBD = chosen_LBD.detach()
    # One operation for all levels: r_l - sg(e_l) = z - sg(e_1 + ... + e_l).
    left_LBD = latents_BD - constant_LBD.cumsum(dim=0)
    if residual_grad == "ste":
        left_LBD = torch.cat([left_LBD[:1], left_LBD[1:].detach()])
    estimate = rotate if estimator == "rotation" else straight_through
    return Quantized(
        codes_LB.T,
        estimate(latents_BD, constant_LBD.sum(dim=0)),
        _squared(residuals_LBD - chosen_LBD),
        _squared(left_LBD),
        residuals_LBD,
    )


def assign_codes(
    latents_BD: Tensor,
    codebooks_LKD: Tensor,
    *,
    distance: Distance = "l2",
    assign_last: Assign | None = None,
) -> tuple[Tensor, Tensor]:
    """Return codes (L, B) int64 and the residuals (L, B, D) that each level quantised.

    No gradients: pass detached tensors.
    """
    nearest = partial(nearest_code, distance=distance)
    residual_BD = latents_BD
    codes, residuals = [], []
    for level, codebook_KD in enumerate(codebooks_LKD, start=1):
        is_last = level == len(codebooks_LKD)
        assign = assign_last if is_last and assign_last is not None else nearest
        residuals.append(residual_BD)
        codes.append(assign(residual_BD, codebook_KD))
        residual_BD = residual_BD - codebook_KD.index_select(0, codes[-1])
    return torch.stack(codes), torch.stack(residuals)


def chosen_vectors(codes_LB: Tensor, codebooks_LKD: Tensor) -> Tensor:
    """Return the code vectors (L, B, D), with gradients to the codebooks."""
    num_levels, num_codes, width = codebooks_LKD.shape
    first_L = torch.arange(num_levels, device=codes_LB.device) * num_codes
    return F.embedding(codes_LB + first_L[:, None], codebooks_LKD.view(-1, width))


def quantization_loss(
    quantized: Quantized,
    *,
    commitment: float,
    reduce: LevelReduce = "sum",
    train_codebooks: bool = True,
) -> Tensor:
    """Return codebook + commitment * commitment loss, summed (TIGER) or averaged over levels.

    Without `train_codebooks` (codebooks that follow moving averages) the commitment part alone.
    """
    per_level = commitment * quantized.commitment_L
    if train_codebooks:
        per_level = per_level + quantized.codebook_L
    return reduced(per_level, reduce)


def reduced(per_level_L: Tensor, reduce: LevelReduce) -> Tensor:
    """Return the sum or the mean over levels."""
    return per_level_L.sum() if reduce == "sum" else per_level_L.mean()


def nearest_code(residuals_BD: Tensor, codebook_KD: Tensor, *, distance: Distance = "l2") -> Tensor:
    """Return the code (B,) of the nearest code vector; the lowest of equally near ones."""
    if distance == "cosine":
        return _argmin(residuals_BD @ -F.normalize(codebook_KD, dim=1).T)
    squares_K = codebook_KD.square().sum(dim=1)
    return _argmin(torch.addmm(squares_K, residuals_BD, codebook_KD.T, alpha=-2.0))


def code_distances(
    residuals_BD: Tensor, codebook_KD: Tensor, *, distance: Distance = "l2"
) -> Tensor:
    """Return squared distances (B, K).

    With "cosine" between the vectors scaled to length 1, that is 2 - 2 cos; a zero vector has the
    cosine 0 with everything.
    """
    if distance == "cosine":
        return 2.0 - 2.0 * (F.normalize(residuals_BD, dim=1) @ F.normalize(codebook_KD, dim=1).T)
    squares_K = codebook_KD.square().sum(dim=1)
    squares_B = residuals_BD.square().sum(dim=1, keepdim=True)
    return torch.addmm(squares_K, residuals_BD, codebook_KD.T, alpha=-2.0) + squares_B


def info_nce(
    vectors_BD: Tensor, targets_BD: Tensor, *, temperature: float = 1.0, cosine: bool = False
) -> Tensor:
    """Return -mean_i log softmax_j(<v_i, t_j> / temperature)[i]: in-batch negatives.

    CoST's contrastive reconstruction (cosine, with a temperature) and LETTER's collaborative
    alignment (dot product, without one).
    """
    if cosine:
        vectors_BD, targets_BD = F.normalize(vectors_BD, dim=1), F.normalize(targets_BD, dim=1)
    logits_BB = vectors_BD @ targets_BD.T / temperature
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


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
    Q = exp(-d / epsilon), then columns and rows are normalised in turn, in float64. epsilon = 0.003
    spans exp(+-333), so the factors of rows and columns move into the exponent whenever they grow
    large: between such moves an iteration is two matrix-vector products, not two logsumexp.

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
    log_q = _normalised(log_q)
    plan, rows_B, columns_K = log_q.exp(), d.new_ones(len(d)), d.new_ones(d.shape[1])
    for iteration in range(1, num_iterations):
        before_K = columns_K
        columns_K = (d.shape[1] * (rows_B @ plan)).reciprocal_()
        if iteration % CHECK_EVERY == 1 and _is_balanced(before_K / columns_K, tolerance):
            columns_K = before_K
            break
        rows_B = (len(d) * (plan @ columns_K)).reciprocal_()
        if iteration % CHECK_EVERY == 0 and (_is_extreme(rows_B) or _is_extreme(columns_K)):
            log_q = _normalised(log_q + rows_B.log()[:, None] + columns_K.log())
            plan, rows_B, columns_K = log_q.exp(), rows_B.new_ones(len(d)), d.new_ones(d.shape[1])
    return plan * rows_B[:, None] * columns_K


def _is_balanced(column_sums_K: Tensor, tolerance: float) -> bool:
    return bool(((column_sums_K - 1).abs() < tolerance).all())


def _normalised(log_q: Tensor) -> Tensor:
    """Normalise columns, then rows, in the log domain."""
    log_b, log_k = (torch.tensor(float(n), dtype=log_q.dtype).log() for n in log_q.shape)
    log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True) - log_k
    return log_q - torch.logsumexp(log_q, dim=1, keepdim=True) - log_b


def _is_extreme(factors: Tensor) -> bool:
    low, high = torch.aminmax(factors)
    return bool(~((low > 1 / ABSORB_ABOVE) & (high < ABSORB_ABOVE)))


def balanced_code(
    residuals_BD: Tensor,
    codebook_KD: Tensor,
    *,
    epsilon: float,
    num_iterations: int,
    distance: Distance = "l2",
) -> Tensor:
    """Return the code (B,) with the largest share of each row of the Sinkhorn plan."""
    distances = code_distances(residuals_BD, codebook_KD, distance=distance)
    return sinkhorn(distances, epsilon=epsilon, num_iterations=num_iterations).argmax(dim=1)


def _argmin(values_BK: Tensor) -> Tensor:
    """Return the place (B,) of each row's least value; on the CPU numpy is six times faster."""
    if values_BK.device.type != "cpu":
        return values_BK.argmin(dim=1)
    return torch.from_numpy(values_BK.detach().numpy().argmin(axis=1))


def _squared(differences_LBD: Tensor) -> Tensor:
    """Return the mean squared length per level (L,)."""
    return differences_LBD.square().sum(dim=2).mean(dim=1)
