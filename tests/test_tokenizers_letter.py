"""Do LETTER's alignment and diversity do what they claim, and are its clusters within bounds?"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

from genrec.config import parse
from genrec.data import Catalog, Interactions
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, UserError
from genrec.features.collaborative import collaborative_vectors, cooccurrence
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers.diagnostics.figures import level_figures
from genrec.tokenizers.letter import LETTER
from genrec.tokenizers.quantization.constrained_kmeans import bounded_labels, constrained_kmeans
from genrec.tokenizers.quantization.letter_training import (
    CodeGroups,
    LetterObjective,
    diversity_loss,
)
from genrec.tokenizers.quantization.residual import info_nce, residual_quantize
from genrec.tokenizers.quantization.rqvae_training import Network, train
from genrec.tokenizers.rqvae import RQVAE

TINY: dict[str, Any] = {
    "num_levels": 3,
    "codebook_size": 8,
    "latent_dim": 6,
    "hidden_dims": [24],
    "num_epochs": 6,
    "batch_size": 32,
}


class TestLETTER(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "letter", **TINY}


class TestLETTERWithOptions(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "letter",
        **TINY,
        "level_reduce": "mean",
        "gradient": "rotation",
        "last_level": "nearest",
        "constrained_init": False,
        "alpha": 0.5,
        "beta": 0.1,
        "collaborative": {"weighting": "cosine", "width": 6},
    }


def config(**values: Any) -> LETTER.Config:
    return parse(LETTER.Config, values, path="tokenizer")


def network_of(settings: LETTER.Config, width: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Network(width, settings)


# -- what the papers claim, on planted data ---------------------------------------------------


def sharing_follows_cooccurrence(alpha: float, seed: int) -> float:
    """Correlate shared prefixes with co-occurrence where contents mostly say something else."""
    data = planted(250, num_users=500, seed=seed, branching=4)
    relevant = data.catalog.vectors
    distracting = relevant[np.random.default_rng(seed).permutation(250)]
    catalog = data.catalog.with_vectors(np.concatenate([0.6 * relevant, distracting], axis=1))
    training = data.interactions.training()
    section = {**TINY, "hidden_dims": [64], "latent_dim": 16, "num_epochs": 40, "batch_size": 64}
    codes = LETTER(config(**section, alpha=alpha, seed=seed)).fit(catalog, training).encode(catalog)
    shared = (codes[:, None] == codes[None]).cumprod(axis=2).sum(axis=2)
    pairs = np.triu_indices(250, 1)
    together = cooccurrence(training).toarray()[pairs]
    return float(np.corrcoef(shared[pairs], together)[0, 1])


def test_alignment_makes_code_sharing_follow_cooccurrence():
    without, with_alignment = (sharing_follows_cooccurrence(a, seed=0) for a in (0.0, 1.0))
    assert with_alignment > without + 0.05


def usage_from_a_skewed_codebook(beta: float, seed: int) -> float:
    """Return the perplexity of codes trained from a narrow cloud, latents held on a sphere."""
    section = config(
        num_levels=1, codebook_size=32, latent_dim=4, batch_size=100, num_epochs=40, num_groups=4,
        alpha=0, beta=beta, learning_rate=0.01, seed=seed,
        kmeans_init=False, dead_code_every=0, last_level="nearest",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(400, 4))
    latents = torch.tensor(latents / np.linalg.norm(latents, axis=1, keepdims=True)).float()
    network = network_of(section, 4)
    network.encoder, network.decoder = nn.Identity(), nn.Identity()
    cloud = np.array([1, 0, 0, 0]) + 0.1 * rng.normal(size=(1, 32, 4))
    with torch.no_grad():
        network.codebooks.copy_(torch.from_numpy(cloud))
    train(network, latents, section, LetterObjective(network, section, np.zeros((400, 4), "f4")))
    codes = network.quantize(latents).codes_BL.numpy()
    perplexity: float = level_figures(codes, [32])[0]["perplexity"]
    return perplexity


def test_diversity_raises_the_perplexity_of_a_skewed_codebook():
    without, diverse = (
        np.array([usage_from_a_skewed_codebook(beta, seed) for seed in range(2)])
        for beta in (0.0, 0.01)
    )
    assert diverse.mean() > without.mean() + 1.0


# -- the losses -------------------------------------------------------------------------------


def test_diversity_equals_a_computation_by_hand():
    book = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 3.0]]], requires_grad=True)
    # code 2 = (1, 1), positive 1; dot products with 0, 1, 3: 1, 2, 2
    found = diversity_loss(book, torch.tensor([[2]]), torch.tensor([[1]]))
    by_hand = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(2)))
    assert found.tolist() == [pytest.approx(by_hand, abs=1e-6)]
    (gradient,) = torch.autograd.grad(found.sum(), book)
    # e_1 moves towards e_2 (its share is below 1), e_0 and e_3 away from it
    assert (gradient[0, 1] < 0).all() and (gradient[0, 0] > 0).all() and (gradient[0, 3] > 0).all()
    batch = diversity_loss(book, torch.tensor([[2, 2, 0]]), torch.tensor([[1, 1, 3]]))
    # code 0 = (1, 0), positive 3; dot products with 1, 2, 3: 0, 1, -1
    other = -math.log(math.exp(-1) / (math.exp(0) + math.exp(1) + math.exp(-1)))
    assert batch.tolist() == [pytest.approx((2 * by_hand + other) / 3, abs=1e-6)]


def test_the_loss_adds_alignment_and_diversity_with_their_weights():
    rng = np.random.default_rng(0)
    inputs, rows = torch.from_numpy(rng.normal(size=(20, 5)).astype("f4")), torch.arange(20)
    targets = rng.normal(size=(20, 6)).astype("f4")
    targets[[3, 8]] = 0
    found = {}
    for alpha, beta in [(0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (0.5, 0.3)]:
        section = config(**TINY, alpha=alpha, beta=beta)
        objective = LetterObjective(network_of(section, 5), section, targets)
        objective.start_epoch()
        parts, quantized = objective.losses(inputs, rows)
        found[alpha, beta] = dict(zip(objective.names(section), parts.tolist(), strict=True))
    keep = np.setdiff1d(np.arange(20), [3, 8])
    alignment = info_nce(quantized.vectors_BD[keep], torch.from_numpy(targets[keep])).item()
    both, plain = found[0.5, 0.3], found[0.0, 0.0]
    assert both["alignment"] == pytest.approx(alignment, rel=1e-5)
    assert plain["alignment"] == plain["diversity"] == 0
    assert both["diversity"] > 0
    expected = plain["loss"] + 0.5 * both["alignment"] + 0.3 * both["diversity"]
    assert both["loss"] == pytest.approx(expected, rel=1e-5)
    assert found[0.5, 0.0]["diversity"] == 0 and found[0.0, 0.3]["alignment"] == 0


def test_alignment_trains_the_encoder_and_diversity_the_code_vectors():
    section = config(**TINY, alpha=1.0, beta=1.0)
    network = network_of(section, 5)
    targets = np.random.default_rng(1).normal(size=(20, 6)).astype("f4")
    objective = LetterObjective(network, section, targets)
    objective.start_epoch()
    latents = network.encoder(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))
    quantized = residual_quantize(latents, network.codebooks)
    terms = objective.extra(quantized, network.codebooks, torch.arange(20))
    (_, alignment), (_, diversity) = terms
    found = torch.autograd.grad(alignment, [latents, network.codebooks], allow_unused=True)
    assert found[0].norm() > 0 and (found[1] is None or found[1].norm() == 0)
    found = torch.autograd.grad(diversity, [latents, network.codebooks], allow_unused=True)
    assert found[1].norm() > 0 and (found[0] is None or found[0].norm() == 0)


def test_without_both_terms_it_is_the_rqvae():
    data = planted(96, num_users=40, branching=3)
    same = {**TINY, "last_level": "nearest"}
    letter = LETTER(config(**same, alpha=0, beta=0, constrained_init=False)).fit(data.catalog)
    plain = RQVAE(parse(RQVAE.Config, same)).fit(data.catalog)
    assert np.array_equal(letter.encode(data.catalog), plain.encode(data.catalog))
    assert set(letter.history) - set(plain.history) == {"alignment", "diversity"}


# -- groups and clusters ----------------------------------------------------------------------


@pytest.mark.parametrize(("num_codes", "num_groups"), [(256, 10), (8, 4), (5, 2), (1024, 10)])
def test_groups_have_their_sizes_and_positives_are_other_codes_of_the_group(num_codes, num_groups):
    rng = np.random.default_rng(0)
    books = rng.normal(size=(2, num_codes, 4)).astype("f4")
    books[:, num_codes // 2 :] *= 0.05  # half of the codes in one place
    groups = CodeGroups.of(books, num_groups, seed=0)
    smallest = max(2, min(10, num_codes // (2 * num_groups)))
    sizes = groups.sizes_LK
    assert sizes.min() >= smallest
    assert sizes.max() <= max(60, 2 * -(-num_codes // num_groups))
    codes = torch.arange(num_codes).repeat(2, 1)
    seen = np.zeros((num_codes, num_codes), bool)
    for draw in np.linspace(0, 0.999, 80):
        found = groups.positives(codes, torch.full(codes.shape, float(draw)))
        assert (found != codes).all()
        for level in range(2):
            assert torch.equal(groups.firsts_LK[level][found[level]], groups.firsts_LK[level])
        seen[codes[0], found[0]] = True
    if num_codes <= 256:  # enough draws for every pair, enough iterations to settle
        assert np.array_equal(seen.sum(axis=1), sizes[0] - 1)
        again = CodeGroups.of(books, num_groups, seed=1, before=groups)
        assert torch.equal(again.order_LK, groups.order_LK)


def optimal_cost(distances: np.ndarray, smallest: int, largest: int) -> float:
    """Return the least total by a linear assignment to replicated centroids."""
    must = np.repeat(distances - 1e4, smallest, axis=1)
    may = np.repeat(distances, largest - smallest, axis=1)
    cost = np.concatenate([must, may], axis=1)
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].sum() + 1e4 * smallest * distances.shape[1])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_bounded_labels_cost_the_least(data, seed):
    rng = np.random.default_rng(seed)
    num_points = data.draw(st.integers(1, 30))
    num_clusters = data.draw(st.integers(1, min(7, num_points)))
    smallest = data.draw(st.integers(0, num_points // num_clusters))
    largest = data.draw(st.integers(max(smallest, -(-num_points // num_clusters)), num_points))
    points = rng.normal(size=(num_points, 2)).astype("f4") ** 3
    if data.draw(st.booleans()):
        points = np.round(points)  # many equal distances
    centroids = rng.normal(size=(num_clusters, 2)).astype("f4")
    labels = bounded_labels(points, centroids, smallest=smallest, largest=largest)
    sizes = np.bincount(labels, minlength=num_clusters)
    assert sizes.min() >= smallest and sizes.max() <= largest
    distances = np.square(points[:, None] - centroids).sum(axis=2).astype(np.float64)
    best = optimal_cost(distances, smallest, largest)
    assert distances[np.arange(num_points), labels].sum() == pytest.approx(best, abs=1e-2, rel=1e-4)


def test_constrained_clusters_are_within_bounds_and_start_codebooks():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(190, 4)) * 0.01, 5 * rng.normal(size=(10, 4))])
    points = points.astype("f4")
    clusters = constrained_kmeans(points, 10, smallest=7, largest=40, num_iterations=10)
    sizes = np.bincount(clusters.labels, minlength=10)
    assert sizes.min() >= 7 and sizes.max() <= 40
    for code in range(10):
        assert np.allclose(
            clusters.centroids[code], points[clusters.labels == code].mean(axis=0), atol=1e-4
        )
    for constrained, least in [(True, 10), (False, 1)]:
        section = config(**TINY, constrained_init=constrained)
        objective = LetterObjective(network_of(section, 4), section, np.zeros((200, 6), "f4"))
        found = objective.cluster(points, 8, 0)
        assert np.bincount(found.labels, minlength=8).min() >= least


# -- input ------------------------------------------------------------------------------------


def test_items_without_interactions_are_left_out_of_the_alignment():
    data = planted(96, num_users=40, branching=3)
    training = data.interactions.training()
    few = Interactions(
        training.item_rows % 40, training.offsets, training.timestamps, training.splits, 96
    )
    vectors = collaborative_vectors(few, config(**TINY).collaborative)
    assert (vectors[40:] == 0).all()
    tokenizer = LETTER(config(**TINY, alpha=0.5)).fit(data.catalog, few)
    assert np.isfinite(tokenizer.history["alignment"]).all()
    section = config(**TINY, alpha=0.5)
    objective = LetterObjective(network_of(section, 16), section, np.zeros((96, 6), "f4"))
    parts, _ = objective.losses(torch.from_numpy(data.catalog.vectors), torch.arange(96))
    assert parts[objective.names(section).index("alignment")] == 0


def test_it_says_which_interactions_it_needs():
    data = planted(96, num_users=40, branching=3)
    assert LETTER.needs == {"vectors", "interactions"}
    with pytest.raises(UserError, match=r"needs the training interactions.*alpha=0"):
        LETTER(config(**TINY)).fit(data.catalog)
    with pytest.raises(UserError, match=r"are of 96 items, the catalogue has 50"):
        LETTER(config(**TINY)).fit(data.catalog.select(range(50)), data.interactions.training())
    with pytest.raises(UserError, match="validation or test"):
        LETTER(config(**TINY)).fit(data.catalog, data.interactions)
    with pytest.raises(ConfigError, match=r"beta > 0.*codebook_update=gradient"):
        config(**TINY, codebook_update="ema")
    assert config(**TINY, codebook_update="ema", beta=0).codebook_update == "ema"


def test_a_level_with_one_or_two_codes_and_few_items():
    data = planted(96, num_users=40, branching=3)
    training = data.interactions.training()
    for size in (1, 2):
        section = {**TINY, "codebook_size": size, "beta": 0.1, "num_epochs": 2}
        tokenizer = LETTER(config(**section)).fit(data.catalog, training)
        assert np.isfinite(tokenizer.history["loss"]).all()
        assert tokenizer.history["diversity"] == [0.0, 0.0]
    few = Catalog(data.catalog.table, np.repeat(data.catalog.vectors[:6], 16, axis=0))
    with pytest.raises(UserError, match="only 6 different"):
        LETTER(config(**TINY)).fit(few, training)


def test_the_seed_decides_and_reaches_the_collaborative_vectors():
    data = planted(96, num_users=40, branching=3)
    training = data.interactions.training()
    codes = [
        LETTER(config(**TINY, seed=seed)).fit(data.catalog, training).encode(data.catalog)
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])
