"""Are the gradients of residual quantization what the formulas say, and is Sinkhorn balanced?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec.tokenizers.quantization.residual import (
    balanced_code,
    code_distances,
    info_nce,
    nearest_code,
    quantization_loss,
    residual_quantize,
    rotate,
    sinkhorn,
    straight_through,
)

LEVELS, CODES, WIDTH = 3, 8, 5


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(32, WIDTH, generator=generator, requires_grad=True)
    codebooks = torch.randn(LEVELS, CODES, WIDTH, generator=generator, requires_grad=True)
    return latents, codebooks


def gradient(loss, of):
    (found,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return torch.zeros_like(of) if found is None else found


@pytest.mark.parametrize("level", range(LEVELS))
def test_each_commitment_trains_the_encoder_with_detached_codes(parts, level):
    latents, codebooks = parts
    quantized = residual_quantize(latents, codebooks, residual_grad="detached_code")
    found = gradient(quantized.commitment_L[level], latents)
    codes = quantized.codes_BL
    left = latents - sum(codebooks[i, codes[:, i]] for i in range(level + 1))
    assert torch.allclose(found, 2 * left / len(latents), atol=1e-6)
    assert found.norm() > 0
    assert gradient(quantized.commitment_L[level], codebooks).norm() == 0


def test_only_the_first_commitment_trains_the_encoder_with_straight_through_residuals(parts):
    latents, codebooks = parts
    detached = residual_quantize(latents, codebooks, residual_grad="detached_code")
    quantized = residual_quantize(latents, codebooks, residual_grad="ste")
    assert gradient(quantized.commitment_L[0], latents).norm() > 0
    for level in range(1, LEVELS):
        assert gradient(quantized.commitment_L[level], latents).norm() == 0
    assert torch.equal(quantized.codes_BL, detached.codes_BL)
    assert torch.allclose(quantized.commitment_L, detached.commitment_L)


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("residual_grad", ["detached_code", "ste"])
def test_each_codebook_loss_trains_the_chosen_codes_of_its_level_only(parts, level, residual_grad):
    latents, codebooks = parts
    quantized = residual_quantize(latents, codebooks, residual_grad=residual_grad)
    loss = quantized.codebook_L[level]
    assert gradient(loss, latents).norm() == 0
    moved = gradient(loss, codebooks).norm(dim=2) > 0
    chosen = torch.zeros(LEVELS, CODES, dtype=torch.bool)
    chosen[level, quantized.codes_BL[:, level]] = True
    assert torch.equal(moved, chosen)


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_forward_value_is_the_sum_of_codes(parts, estimator):
    latents, codebooks = parts
    quantized = residual_quantize(latents, codebooks, estimator=estimator)
    expected = sum(codebooks[i, quantized.codes_BL[:, i]] for i in range(LEVELS))
    assert (quantized.vectors_BD - expected).abs().max() < 1e-5
    assert gradient(quantized.vectors_BD.sum(), codebooks).norm() == 0
    left = latents
    for level in range(LEVELS):
        assert torch.equal(
            quantized.codes_BL[:, level], torch.cdist(left, codebooks[level]).argmin(1)
        )
        left = left - codebooks[level, quantized.codes_BL[:, level]]


def test_straight_through_passes_the_gradient_unchanged(parts):
    latents, _ = parts
    weight = torch.randn(latents.shape)
    found = gradient(
        (straight_through(latents, torch.randn(latents.shape)) * weight).sum(), latents
    )
    assert torch.equal(found, weight)


def test_rotation_turns_and_scales_the_gradient():
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(50, 6, generator=generator, dtype=torch.double, requires_grad=True)
    q = torch.randn(50, 6, generator=generator, dtype=torch.double)
    weight = torch.randn(50, 6, generator=generator, dtype=torch.double)
    assert (rotate(e, q) - q).abs().max() < 1e-12
    found = gradient((rotate(e, q) * weight).sum(), e)
    scale = q.norm(dim=1) / e.detach().norm(dim=1)
    assert torch.allclose(found.norm(dim=1), scale * weight.norm(dim=1))
    # the angle between gradient and vector is kept: <grad, e> = <weight, q>
    assert torch.allclose((found * e).sum(1), (weight * q).sum(1))


def test_rotation_falls_back_where_it_is_not_defined():
    e = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    q = torch.tensor([[-2.0, -4.0], [1.0, 1.0], [0.0, 0.0]])
    result = rotate(e, q)
    assert torch.allclose(result, q)
    assert torch.equal(gradient(result.sum(), e), torch.ones_like(e))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(1e-3, 1e3))
@example(seed=2771, width=2, scale=1.5)
def test_rotation_forward_error_is_small_even_for_nearly_opposite_vectors(seed, width, scale):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(20, width, generator=generator)
    q = torch.randn(20, width, generator=generator) * scale
    assert (rotate(e, q) - q).abs().max() < 1e-5 * max(1.0, scale)


def test_loss_sums_or_averages_levels(parts):
    latents, codebooks = parts
    quantized = residual_quantize(latents, codebooks)
    each = quantized.codebook_L + 0.25 * quantized.commitment_L
    total = quantization_loss(quantized, commitment=0.25)
    assert torch.allclose(total, each.sum())
    mean = quantization_loss(quantized, commitment=0.25, reduce="mean")
    assert torch.allclose(mean, each.sum() / LEVELS)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.003, 5000), (0.05, 50)])
def test_sinkhorn_marginals(epsilon, iterations):
    distances = torch.rand(96, 12, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(distances, epsilon=epsilon, num_iterations=iterations, tolerance=5e-4)
    assert (plan.sum(dim=1) * 96 - 1).abs().max() < 1e-3
    assert (plan.sum(dim=0) * 12 - 1).abs().max() < 1e-3
    assert torch.isfinite(plan).all()


def test_sinkhorn_of_equal_distances_is_uniform():
    plan = sinkhorn(torch.ones(6, 3), epsilon=0.003, num_iterations=50)
    assert torch.allclose(plan, torch.full((6, 3), 1 / 18, dtype=plan.dtype))


def test_balanced_codes_spread_a_skewed_batch():
    residuals = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 1.0
    codebook = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    plain = torch.bincount(nearest_code(residuals, codebook), minlength=8)
    balanced = torch.bincount(
        balanced_code(residuals, codebook, epsilon=0.003, num_iterations=500), minlength=8
    )
    assert plain.max() > 32
    assert balanced.max() <= 10 and balanced.min() >= 6


def test_distances_are_squared_euclidean():
    a, b = torch.randn(7, 4), torch.randn(5, 4)
    assert torch.allclose(code_distances(a, b), torch.cdist(a, b).square(), atol=1e-4)


def test_sinkhorn_equals_plain_normalisation_in_the_log_domain():
    generator = torch.Generator().manual_seed(3)
    skew = 5 * torch.rand(24, generator=generator)
    for epsilon, iterations in [(0.003, 50), (0.0005, 130), (0.05, 1), (0.05, 12)]:
        distances = torch.rand(70, 24, generator=generator) ** 3 + skew
        plan = sinkhorn(distances, epsilon=epsilon, num_iterations=iterations, tolerance=0.0)
        d = distances.double()
        centre, half_range = (d.min() + d.max()) / 2, (d.max() - d.min()) / 2
        log_q = -(d - centre) / half_range / epsilon
        for _ in range(iterations):
            log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
            log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
        assert torch.allclose(plan, log_q.exp() / 70, atol=1e-12)


@pytest.mark.parametrize("residual_grad", ["detached_code", "ste"])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_levels_at_once_equal_levels_one_by_one(parts, residual_grad, distance):
    latents, codebooks = parts
    quantized = residual_quantize(
        latents, codebooks, residual_grad=residual_grad, distance=distance
    )
    residual = latents
    for level, book in enumerate(codebooks):
        assert torch.allclose(quantized.residuals_LBD[level], residual.detach(), atol=1e-6)
        distances = code_distances(residual, book, distance=distance)
        codes = distances.argmin(dim=1)
        assert torch.equal(quantized.codes_BL[:, level], codes)
        assert torch.equal(nearest_code(residual, book, distance=distance), codes)
        vectors = book[codes]
        codebook_loss = (residual.detach() - vectors).square().sum(1).mean()
        commitment = (residual - vectors.detach()).square().sum(1).mean()
        for found, expected in [
            (quantized.codebook_L[level], codebook_loss),
            (quantized.commitment_L[level], commitment),
        ]:
            assert torch.allclose(found, expected, atol=1e-5)
            for of in (latents, codebooks):
                assert torch.allclose(gradient(found, of), gradient(expected, of), atol=1e-6)
        value = vectors.detach()
        if residual_grad == "ste":
            value = straight_through(residual, vectors)
        residual = residual - value


def test_cosine_equals_l2_on_vectors_of_length_one(parts):
    latents, codebooks = (torch.nn.functional.normalize(t.detach(), dim=-1) for t in parts)
    for book in codebooks:
        one, other = (code_distances(latents, book, distance=d) for d in ("l2", "cosine"))
        assert torch.allclose(one, other, atol=1e-6)
        codes = [nearest_code(latents, book, distance=d) for d in ("l2", "cosine")]
        assert torch.equal(*codes)
    scaled = code_distances(3 * latents, 0.1 * codebooks[0], distance="cosine")
    assert torch.allclose(scaled, code_distances(latents, codebooks[0]), atol=1e-6)


def test_cosine_of_a_zero_vector_takes_the_first_code():
    book = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    zero = torch.zeros(1, 2)
    assert torch.equal(code_distances(zero, book, distance="cosine"), torch.full((1, 3), 2.0))
    assert nearest_code(zero, book, distance="cosine").tolist() == [0]


def test_info_nce_equals_a_computation_by_hand():
    vectors = torch.tensor([[2.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    # cosines: [1, .6, 0], [0, .8, 1], [.7071, .9899, .7071]; temperature 0.5
    cosines = [[1.0, 0.6, 0.0], [0.0, 0.8, 1.0], [0.5**0.5, 7 / 50**0.5, 0.5**0.5]]
    by_hand = 0.0
    for i, row in enumerate(cosines):
        powers = [math.exp(value / 0.5) for value in row]
        by_hand -= math.log(powers[i] / sum(powers)) / 3
    found = info_nce(vectors, targets, temperature=0.5, cosine=True)
    assert found.item() == pytest.approx(by_hand, abs=1e-6)
    # dot products: [2, 6, 0], [0, 2, 1], [1, 7, 2]
    dots = [[2.0, 6.0, 0.0], [0.0, 2.0, 1.0], [1.0, 7.0, 2.0]]
    by_hand = sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(dots)) / 3
    assert info_nce(vectors, targets).item() == pytest.approx(by_hand, abs=1e-6)
    assert info_nce(vectors[:1], targets[:1]).item() == 0.0


def test_the_codebook_loss_is_left_out_for_moving_averages(parts):
    quantized = residual_quantize(*parts)
    found = quantization_loss(quantized, commitment=0.25, train_codebooks=False)
    assert torch.allclose(found, 0.25 * quantized.commitment_L.sum())
    assert gradient(found, parts[1]).norm() == 0
