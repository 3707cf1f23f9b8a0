"""Do the RQ-VAE's options do what their formulas say, and what their papers claim?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from genrec.config import parse
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers.diagnostics.figures import collision_figures, neighbour_figures
from genrec.tokenizers.quantization import codebooks
from genrec.tokenizers.quantization.codebooks import MovingAverages, Usage, kmeans_codebooks
from genrec.tokenizers.quantization.residual import residual_quantize
from genrec.tokenizers.quantization.rqvae_training import (
    Network,
    Objective,
    initialise_codebooks,
    train,
)
from genrec.tokenizers.rqvae import RQVAE

TINY: dict[str, Any] = {
    "codebook_size": 8,
    "latent_dim": 6,
    "hidden_dims": [24],
    "num_epochs": 6,
    "batch_size": 32,
}
SMALL: dict[str, Any] = {
    "codebook_size": 5,
    "hidden_dims": [64, 32],
    "latent_dim": 16,
    "batch_size": 64,
    "num_epochs": 30,
    "dead_code_every": 10,
}


class TestRQVAEWithMovingAverages(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "rqvae", **TINY, "codebook_update": "ema"}


class TestRQVAEWithCosineAndContrast(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "rqvae",
        **TINY,
        "distance": "cosine",
        "contrastive_weight": 0.5,
    }


def config(**settings: Any) -> RQVAE.Config:
    return parse(RQVAE.Config, settings, path="tokenizer")


def fit(catalog: Catalog, **settings: Any) -> RQVAE:
    return RQVAE(config(**settings)).fit(catalog)


def tree(num_items: int = 400, seed: int = 0, **changes: Any) -> Catalog:
    return planted(
        num_items, num_users=1, seed=seed, **{"branching": 5, "width": 24, **changes}
    ).catalog


def error_of(tokenizer: RQVAE, catalog: Catalog) -> float:
    decoded = tokenizer.decode(tokenizer.encode(catalog))
    return float(np.square(tokenizer.inputs(catalog) - decoded).sum())


def network_of(settings: RQVAE.Config, width: int = 24) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return Network(width, settings)


# -- quality on planted data ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_update": "ema", "ema_decay": 0.9},
        {"distance": "cosine"},
        {"contrastive_weight": 0.5},
    ],
    ids=str,
)
def test_first_codes_recover_the_planted_tree(options):
    catalog = tree()
    codes = fit(catalog, **SMALL, **options).encode(catalog)
    top = np.unique([c[0] for c in catalog.table["category"].to_list()], return_inverse=True)[1]
    assert normalized_mutual_info_score(top, codes[:, 0]) > 0.8
    assert len(np.unique(codes[:, 0])) / 5 > 0.8


@pytest.mark.parametrize(
    "options", [{"codebook_update": "ema", "ema_decay": 0.9}, {"distance": "cosine"}], ids=str
)
def test_three_levels_reconstruct_better_than_one_of_the_same_size(options):
    catalog = tree()
    three, one = (fit(catalog, **SMALL, **options, num_levels=n) for n in (3, 1))
    assert error_of(three, catalog) < 0.9 * error_of(one, catalog)


def test_contrastive_reconstruction_keeps_more_neighbours():
    settings = {**SMALL, "codebook_size": 32}
    overlap, rate = np.zeros((2, 2)), np.zeros((2, 2))
    for seed in range(2):
        catalog = tree(300, seed, branching=4, noise=1.5)
        for column, weight in enumerate((0.0, 0.5)):
            tokenizer = fit(catalog, **settings, contrastive_weight=weight, seed=seed)
            codes = tokenizer.encode(catalog)
            figures = neighbour_figures(tokenizer.inputs(catalog), tokenizer.decode(codes))
            overlap[seed, column] = figures["overlap"]
            rate[seed, column] = collision_figures(codes)["rate"]
    assert (overlap[:, 1] > overlap[:, 0]).all()
    assert overlap[:, 1].mean() > overlap[:, 0].mean() + 0.05
    assert rate[:, 1].mean() <= rate[:, 0].mean()


# -- codebooks without gradients --------------------------------------------------------------


def test_a_moving_average_update_equals_the_closed_form():
    settings = config(codebook_size=4, num_levels=2, latent_dim=3, ema_decay=0.8, batch_size=10)
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 4, 3, generator=generator)
    book = torch.nn.Parameter(before.clone(), requires_grad=False)
    averages = MovingAverages(book, settings)
    counts, sums = np.full((2, 4), 2.5), before.double().numpy() * 2.5
    for _ in range(3):
        codes = torch.randint(4, (2, 10), generator=generator)
        residuals = torch.randn(2, 10, 3, generator=generator)
        averages.update(codes, residuals)
        for level in range(2):
            for code in range(4):
                mine = residuals[level][codes[level] == code].double().numpy()
                counts[level, code] = 0.8 * counts[level, code] + 0.2 * len(mine)
                sums[level, code] = 0.8 * sums[level, code] + 0.2 * mine.sum(axis=0)
        total = counts.sum(axis=1, keepdims=True)
        smoothed = (counts + 1e-5) / (total + 4 * 1e-5) * total
        assert np.allclose(book.numpy(), sums / smoothed[..., None], atol=1e-5)


def test_moving_averages_of_constant_residuals_reach_their_mean():
    settings = config(codebook_size=2, num_levels=1, latent_dim=2, ema_decay=0.5, batch_size=4)
    book = torch.nn.Parameter(torch.tensor([[[9.0, 9.0], [5.0, 5.0]]]), requires_grad=False)
    averages = MovingAverages(book, settings)
    residuals = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [0.0, 2.0]]])
    for _ in range(60):
        averages.update(torch.tensor([[0, 0, 1, 1]]), residuals)
    assert torch.allclose(book, torch.tensor([[[2.0, 3.0], [0.0, 1.0]]]), atol=1e-3)


def test_with_moving_averages_gradients_never_reach_the_codebooks():
    catalog = tree(125)
    settings = config(**TINY, codebook_update="ema", ema_decay=0.0, dead_code_every=0)
    network, inputs = network_of(settings), torch.from_numpy(catalog.vectors)
    network.codebooks.requires_grad_(False)
    parts, quantized = Objective(network, settings).losses(inputs[:32], torch.arange(32))
    parts[0].backward()
    assert network.codebooks.grad is None
    assert network.encoder[0].weight.grad.norm() > 0
    expected = parts[1] + 0.25 * parts[3]
    assert torch.allclose(parts[0], expected) and parts[2] > 0
    assert quantized.codebook_L.requires_grad is False


def test_moved_codes_start_their_moving_averages_anew():
    settings = config(**TINY, codebook_update="ema", usage_decay=0.0)
    network = network_of(settings)
    network.codebooks.requires_grad_(False)
    averages = MovingAverages(network.codebooks, settings)
    usage = Usage(network.codebooks, settings, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(32, 6, generator=generator)
    quantized = residual_quantize(latents, network.codebooks)
    usage.update(quantized.codes_BL.T)
    averages.update(quantized.codes_BL.T, quantized.residuals_LBD)
    dead = usage.share_LK == 0
    assert dead.any()
    usage.move_dead_codes(quantized, torch.optim.SGD(network.encoder.parameters()), averages)
    assert (averages.counts_LK[dead] == 32 / 8).all()
    means = averages.sums_LKD / averages.counts_LK[..., None]
    assert torch.allclose(means[dead], network.codebooks[dead])
    for level, code in dead.nonzero().tolist():
        distances = torch.cdist(network.codebooks[level, [code]], quantized.residuals_LBD[level])
        assert distances.min() == 0


def test_moves_of_unused_codes_raise_utilisation_with_moving_averages():
    catalog = tree(300)
    settings = {**SMALL, "num_epochs": 15, "kmeans_init": False, "codebook_size": 16}
    used = []
    for every in (0, 5):
        options = {"codebook_update": "ema", "dead_code_every": every}
        tokenizer = fit(catalog, **{**settings, **options})
        used.append(len(np.unique(tokenizer.encode(catalog)[:, 0])))
    assert used[1] > used[0]


def test_first_codebooks_come_from_all_items_above_the_limit_too(monkeypatch):
    settings = config(**TINY, num_levels=2)
    network, catalog = network_of(settings), tree(500)
    inputs = torch.from_numpy(catalog.vectors)
    initialise_codebooks(network, inputs, settings)
    plain = network.quantize(inputs).residuals_LBD[1].square().sum()
    seen = []
    original = codebooks.minibatch_kmeans
    monkeypatch.setattr(codebooks, "LLOYD_ITEMS", 100)
    monkeypatch.setattr(
        codebooks,
        "minibatch_kmeans",
        lambda points, *rest, **more: seen.append(len(points)) or original(points, *rest, **more),
    )
    initialise_codebooks(network, inputs, settings)
    assert seen == [500, 500]
    assert network.quantize(inputs).residuals_LBD[1].square().sum() < 1.5 * plain


def test_first_codes_of_the_cosine_distance_are_means_of_directions_cells():
    points = np.repeat(np.array([[1, 0], [0, 2], [-3, 0]], np.float32), 4, axis=0)
    points *= np.tile(np.array([1, 2, 3, 4], np.float32), 3)[:, None]  # same directions
    settings = config(codebook_size=3, num_levels=1, latent_dim=2, distance="cosine")
    (book,) = kmeans_codebooks(points, settings)
    assert sorted(map(tuple, book.tolist())) == [(-7.5, 0.0), (0.0, 5.0), (2.5, 0.0)]


# -- the objective ----------------------------------------------------------------------------


def test_contrastive_weight_mixes_the_two_reconstructions():
    catalog = tree(125)
    inputs, rows = torch.from_numpy(catalog.vectors)[:40], torch.arange(40)
    found = {}
    for weight in (0.0, 0.25, 1.0):
        settings = config(**TINY, contrastive_weight=weight, contrastive_temperature=0.5)
        network = network_of(settings)
        parts, _ = Objective(network, settings).losses(inputs, rows)
        found[weight] = dict(zip(Objective.names(settings), parts.tolist(), strict=True))
    assert "contrastive" not in found[0.0]
    error, contrast = found[1.0]["reconstruction"], found[1.0]["contrastive"]
    rest = found[1.0]["codebook"] + 0.25 * found[1.0]["commitment"]
    assert found[0.0]["loss"] == pytest.approx(error + rest, rel=1e-5)
    assert found[1.0]["loss"] == pytest.approx(contrast + rest, rel=1e-5)
    assert found[0.25]["loss"] == pytest.approx(0.75 * error + 0.25 * contrast + rest, rel=1e-5)


def test_history_names_its_parts_and_survives_loading(tmp_path):
    catalog = tree(125)
    tokenizer = fit(catalog, **TINY, contrastive_weight=0.5)
    names = ["loss", "reconstruction", "codebook", "commitment", "contrastive"]
    assert list(tokenizer.history) == names
    tokenizer.save(tmp_path / "t")
    loaded = RQVAE.load(tmp_path / "t")
    assert list(loaded.history) == names
    assert loaded.history["contrastive"] == pytest.approx(tokenizer.history["contrastive"])


def test_the_order_of_the_catalogue_changes_nothing():
    catalog = tree(125)
    rows = np.random.default_rng(0).permutation(125)
    shuffled = catalog.select(rows)
    one, other = fit(catalog, **TINY), fit(shuffled, **TINY)
    assert np.array_equal(one.encode(catalog)[rows], other.encode(shuffled))
    for name, values in one.state().items():
        assert np.array_equal(values, other.state()[name])


def test_last_level_distances_are_those_of_the_metric():
    catalog = tree(125)
    for distance in ("l2", "cosine"):
        tokenizer = fit(catalog, **TINY, distance=distance)
        distances = tokenizer.last_level_distances(catalog)
        assert distances.shape == (125, 8) and (distances >= 0).all()
        chosen = tokenizer.encode(catalog)[:, -1]
        assert np.allclose(distances[np.arange(125), chosen], distances.min(axis=1), atol=1e-6)


def test_training_alone_takes_the_default_objective():
    settings = config(**TINY)
    inputs = torch.from_numpy(tree(125).vectors)
    network = network_of(settings)
    history = train(network, inputs, settings)
    assert [len(values) for values in history.values()] == [6] * 4


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"codebook_update": "ema"}, {"distance": "cosine"}], ids=str)
def test_small_and_degenerate_catalogues(options):
    settings = {**TINY, **options, "num_epochs": 3}
    few = Catalog.from_vectors(np.random.default_rng(0).normal(size=(9, 4)).astype("f4"))
    tokenizer = fit(few, **settings)  # 9 items, 8 codes: later levels run out of residuals
    assert np.isfinite(tokenizer.decode(tokenizer.encode(few))).all()
    assert len(ItemIndex.build(tokenizer, few, collisions="extra_level").item_ids) == 9
    with pytest.raises(UserError, match="5 items have only 5 different"):
        fit(few.select(range(5)), **settings)
    with pytest.raises(UserError, match="only 1 different"):
        fit(Catalog.from_vectors(np.ones((20, 4), np.float32)), **settings)
    broken = few.vectors.copy()
    broken[3] = np.nan
    with pytest.raises(DataError, match=r"1 item\(s\) hold NaN"):
        fit(few.with_vectors(broken), **settings)
    one = fit(few, **{**settings, "codebook_size": 1})
    assert (one.encode(few) == 0).all()


def test_bad_settings_name_the_key():
    for key, value in [
        ("codebook_update", "adam"),
        ("distance", "dot"),
        ("contrastive_weight", 1.5),
        ("contrastive_temperature", 0),
        ("ema_decay", 1.0),
    ]:
        with pytest.raises(ConfigError, match=rf"tokenizer\.{key}: got {value!r}"):
            config(**{key: value})
