"""Does every tokenizer keep the contract, and do the methods do what their papers claim?"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from sklearn.metrics import normalized_mutual_info_score

from genrec.config import parse_component
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.errors import ConfigError, DataError, UserError
from genrec.item_index import ItemIndex
from genrec.testing.tokenizers import TokenizerContract
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.diagnostics.figures import diagnose
from genrec.tokenizers.quantization.kmeans import balanced_kmeans, kmeans, minibatch_kmeans, nearest

CONFIGS = Path(__file__).parents[1] / "configs" / "tokenizer"


class TestRQKMeans(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "rqkmeans", "codebook_size": 8}


class TestBalancedRQKMeans(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {"name": "rqkmeans", "codebook_size": 8, "balanced": True}


class TestRQVAE(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        "name": "rqvae",
        "codebook_size": 8,
        "latent_dim": 6,
        "hidden_dims": [24],
        "num_epochs": 6,
        "batch_size": 32,
    }


class TestRQVAEWithOptions(TokenizerContract):
    config: ClassVar[dict[str, Any]] = {
        **TestRQVAE.config,
        "gradient": "rotation",
        "residual_grad": "ste",
        "level_reduce": "mean",
        "last_level": "sinkhorn",
        "dead_code_every": 2,
    }


def test_every_registered_tokenizer_is_under_contract():
    """Its class may stand in any file of tests."""
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_tokenizers*.py")]
    contracts = "\n".join(text for text in texts if "(TokenizerContract)" in text)
    assert [name for name in TOKENIZERS if f'"name": "{name}"' not in contracts] == []


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_tokenizer_has_a_complete_config_file(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    section = yaml.safe_load(text)["tokenizer"]
    cls, config = parse_component(TOKENIZERS, section, path="tokenizer")
    assert text.startswith("#") and config.name == name
    assert set(section) == set(cls.Config.model_fields)
    assert config == cls.Config(name=name)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_setting_is_documented(name):
    cls, _ = parse_component(TOKENIZERS, {"name": name}, path="tokenizer")
    fields = cls.Config.model_fields
    assert [key for key, field in fields.items() if not field.description] == []


def make(name: str, **settings: Any) -> ItemTokenizer:
    cls, config = parse_component(TOKENIZERS, {"name": name, **settings}, path="tokenizer")
    return cls(config)


def tree(num_items: int = 400, **changes: Any) -> Catalog:
    return planted(
        num_items, num_users=1, seed=0, **{"branching": 5, "width": 24, **changes}
    ).catalog


def top_nodes(catalog: Catalog) -> np.ndarray:
    return np.unique([c[0] for c in catalog.table["category"].to_list()], return_inverse=True)[1]


def error_of(tokenizer: ItemTokenizer, catalog: Catalog) -> float:
    decoded = tokenizer.decode(tokenizer.encode(catalog))
    return float(np.square(tokenizer.inputs(catalog) - decoded).sum())


# -- quality on planted data ------------------------------------------------------------------

SMALL_RQVAE = {
    "hidden_dims": [64, 32],
    "latent_dim": 16,
    "batch_size": 64,
    "num_epochs": 60,
    "dead_code_every": 10,
}


@pytest.mark.parametrize(("name", "settings"), [("rqkmeans", {}), ("rqvae", SMALL_RQVAE)])
def test_first_codes_recover_the_planted_tree(name, settings):
    catalog = tree()
    codes = make(name, codebook_size=5, **settings).fit(catalog).encode(catalog)
    assert normalized_mutual_info_score(top_nodes(catalog), codes[:, 0]) > 0.8
    assert len(np.unique(codes[:, 0])) / 5 > 0.8


@pytest.mark.parametrize(("name", "settings"), [("rqkmeans", {}), ("rqvae", SMALL_RQVAE)])
def test_three_levels_reconstruct_better_than_one_of_the_same_size(name, settings):
    catalog = tree()
    three = make(name, codebook_size=5, num_levels=3, **settings).fit(catalog)
    one = make(name, codebook_size=5, num_levels=1, **settings).fit(catalog)
    assert error_of(three, catalog) < 0.8 * error_of(one, catalog)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_residual_of_rqkmeans_never_grows_with_the_level(balanced):
    catalog = tree(width=12, noise=2.0)
    tokenizer = make("rqkmeans", codebook_size=7, num_levels=4, balanced=balanced).fit(catalog)
    codes, residual = tokenizer.encode(catalog), tokenizer.inputs(catalog).copy()
    state, energy = tokenizer.state(), [np.square(residual).sum()]
    for level in range(4):
        residual -= state[f"codebook_{level}"][codes[:, level]]
        energy.append(np.square(residual).sum())
    assert (np.diff(energy) <= 0).all()
    assert energy[-1] == pytest.approx(error_of(tokenizer, catalog), rel=1e-4)


def test_rqkmeans_beats_random_codebooks():
    catalog = tree()
    tokenizer = make("rqkmeans", codebook_size=8).fit(catalog)
    rng = np.random.default_rng(0)
    state = tokenizer.state()
    random = make("rqkmeans", codebook_size=8).load_state(
        {name: rng.normal(a.mean(0), a.std(0), a.shape).astype("f4") for name, a in state.items()}
    )
    assert error_of(tokenizer, catalog) < 0.5 * error_of(random, catalog)


@pytest.mark.parametrize(("num_items", "size"), [(130, 8), (128, 8), (131, 10)])
def test_balanced_codes_are_used_equally_often_within_one(num_items, size):
    catalog = tree(num_items)
    tokenizer = make("rqkmeans", codebook_size=size, num_levels=2, balanced=True).fit(catalog)
    codes = tokenizer.encode(catalog)
    for level in range(2):
        counts = np.bincount(codes[:, level], minlength=size)
        assert counts.max() - counts.min() <= 1


def test_a_balanced_item_whose_vector_changed_is_coded_as_new():
    catalog = tree(130)
    tokenizer = make("rqkmeans", codebook_size=8, balanced=True).fit(catalog)
    books = [tokenizer.state()[f"codebook_{level}"] for level in range(3)]
    moved = catalog.with_vectors(catalog.vectors + 1e-3)
    residual = moved.vectors.copy()
    for level, book in enumerate(books):
        codes, _ = nearest(residual, book)
        assert np.array_equal(tokenizer.encode(moved)[:, level], codes)
        residual -= book[codes]


def test_rqvae_history_falls_and_survives_saving(tmp_path):
    catalog = tree(200)
    tokenizer = make("rqvae", codebook_size=8, **{**SMALL_RQVAE, "num_epochs": 25}).fit(catalog)
    history = tokenizer.history
    assert [len(values) for values in history.values()] == [25] * 4
    assert history["reconstruction"][-1] < 0.5 * history["reconstruction"][0]
    tokenizer.save(tmp_path / "t")
    loaded = ItemTokenizer.load(tmp_path / "t")
    assert np.allclose(loaded.history["loss"], history["loss"])


def test_rqvae_returns_the_weights_of_the_last_epoch():
    catalog = tree(150)
    settings = {**SMALL_RQVAE, "codebook_size": 8}
    short, long = (make("rqvae", **{**settings, "num_epochs": n}).fit(catalog) for n in (2, 30))
    assert error_of(long, catalog) < 0.7 * error_of(short, catalog)
    assert error_of(long, catalog) / 150 < 1.1 * long.history["reconstruction"][-1]


def test_moves_of_unused_codes_raise_utilisation():
    catalog = tree(300)
    settings = {**SMALL_RQVAE, "num_epochs": 30, "kmeans_init": False, "codebook_size": 16}
    used = []
    for every in (0, 5):
        tokenizer = make("rqvae", **{**settings, "dead_code_every": every}).fit(catalog)
        used.append(len(np.unique(tokenizer.encode(catalog)[:, 0])))
    assert used[1] > used[0]


def test_fitting_leaves_the_global_random_state_alone():
    import torch

    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)
    make("rqvae", codebook_size=4, **{**SMALL_RQVAE, "num_epochs": 1}).fit(tree(125))
    assert torch.equal(torch.rand(3), before[0]) and np.array_equal(np.random.rand(3), before[1])


def test_the_number_of_threads_does_not_change_rqkmeans():
    from threadpoolctl import threadpool_limits

    catalog = tree()
    codes = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            codes.append(make("rqkmeans", codebook_size=16).fit(catalog).encode(catalog))
    assert np.array_equal(codes[0], codes[1])


# -- k-means ----------------------------------------------------------------------------------


def test_kmeans_labels_are_nearest_and_every_code_is_used():
    points = np.random.default_rng(0).normal(size=(300, 5)).astype("f4")
    centroids, labels = kmeans(points, 20, num_iterations=10, seed=1)
    brute = np.square(points[:, None] - centroids[None]).sum(-1)
    assert np.array_equal(labels, brute.argmin(1))
    assert len(np.unique(labels)) == 20
    assert np.allclose(nearest(points, centroids)[1], brute.min(1), atol=1e-4)


def test_kmeans_finds_separated_clusters_with_duplicates():
    centres = np.array([[0, 0], [50, 0], [0, 50]], np.float32)
    points = np.repeat(centres, 30, axis=0)
    for method in (kmeans, minibatch_kmeans, balanced_kmeans):
        centroids, labels = method(points, 3, num_iterations=10, seed=0)
        assert np.allclose(centroids[labels], points)


def test_large_catalogues_are_fitted_by_minibatches():
    catalog = tree()
    plain = make("rqkmeans", codebook_size=8).fit(catalog)
    batched = make("rqkmeans", codebook_size=8, minibatch_above=100, num_iterations=20).fit(catalog)
    assert not np.array_equal(plain.state()["codebook_0"], batched.state()["codebook_0"])
    assert error_of(batched, catalog) < 2 * error_of(plain, catalog)


# -- bad input --------------------------------------------------------------------------------

NAMES = ["rqkmeans", "rqvae"]


@pytest.mark.parametrize("name", NAMES)
def test_more_codes_than_different_vectors_is_an_error(name):
    vectors = np.repeat(np.eye(5, dtype=np.float32), 4, axis=0)
    with pytest.raises(UserError, match=r"got 8.*20 items have only 5.*codebook_size=5"):
        make(name, codebook_size=8).fit(Catalog.from_vectors(vectors))
    with pytest.raises(UserError, match="only 1 different"):
        make(name, codebook_size=2).fit(Catalog.from_vectors(np.ones((9, 3))))


@pytest.mark.parametrize("name", NAMES)
def test_nan_vectors_are_an_error_that_names_the_items(name):
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    vectors[7, 1] = np.nan
    with pytest.raises(DataError, match=r"1 item\(s\).*'seven'.*embed"):
        ids = ["seven" if row == 7 else f"i{row}" for row in range(20)]
        make(name, codebook_size=2).fit(Catalog.from_vectors(vectors, ids))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_must_be_there_and_as_wide_as_the_fitted_ones(name):
    catalog = tree(125)
    with pytest.raises(UserError, match="no vectors"):
        make(name, codebook_size=4).fit(Catalog(catalog.table))
    settings = {"num_epochs": 1} if name == "rqvae" else {}
    tokenizer = make(name, codebook_size=4, **settings).fit(catalog)
    with pytest.raises(UserError, match=r"\(125, 7\), expected \(items, 24\)"):
        tokenizer.encode(catalog.with_vectors(np.ones((125, 7))))


@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_and_levels_of_one_code_are_fine(name):
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype("f4")
    vectors[:3] = 0
    settings = {"num_epochs": 2} if name == "rqvae" else {}
    catalog = Catalog.from_vectors(vectors)
    tokenizer = make(name, codebook_size=1, normalize=True, **settings).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    assert index.codebook_sizes == (1, 1, 1, 40)
    assert np.isfinite(tokenizer.decode(tokenizer.encode(catalog))).all()


def test_a_level_shrinks_when_residuals_run_out(caplog):
    vectors = np.random.default_rng(0).normal(size=(10, 4)).astype("f4")
    catalog = Catalog.from_vectors(vectors)
    logging.getLogger("genrec").propagate = True
    with caplog.at_level(logging.WARNING, logger="genrec"):
        tokenizer = make("rqkmeans", codebook_size=8).fit(catalog)
    assert tokenizer.codebook_sizes[0] == 8
    assert tokenizer.codebook_sizes[1] < 8
    assert "different residuals are left" in caplog.text
    loaded = make("rqkmeans", codebook_size=8).load_state(tokenizer.state())
    assert np.array_equal(loaded.encode(catalog), tokenizer.encode(catalog))


def test_bad_settings_name_the_key():
    with pytest.raises(ConfigError, match=r"tokenizer\.num_levels: got 0"):
        make("rqkmeans", num_levels=0)
    with pytest.raises(ConfigError, match=r"tokenizer\.codebok_size.*codebook_size"):
        make("rqvae", codebok_size=8)
    with pytest.raises(ConfigError, match=r"tokenizer\.name: got 'rqkmean'.*'rqkmeans'"):
        make("rqkmean")


def test_a_diverging_loss_is_reported_with_a_remedy():
    from genrec.errors import TrainingError

    with pytest.raises(TrainingError, match=r"loss is nan in epoch \d.*learning_rate"):
        make("rqvae", codebook_size=4, learning_rate=1e9, num_epochs=9).fit(tree(125))


# -- diagnostics ------------------------------------------------------------------------------


def test_diagnose_reports_known_figures():
    vectors = np.array([[0, 0], [0, 0.1], [9, 0], [9, 0.1], [0, 9], [9, 9]], np.float32)
    catalog = Catalog.from_vectors(vectors)
    tokenizer = make("rqkmeans", num_levels=1, codebook_size=4).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="extra_level")
    report = diagnose(tokenizer, index, catalog)
    assert report["collisions"] == {
        "rate": pytest.approx(2 / 6),
        "num_distinct": 4,
        "num_items_colliding": 4,
        "largest_group": 2,
    }
    (level,) = report["levels"]
    shares = np.array([2, 2, 1, 1]) / 6
    assert level["used"] == 4 and level["utilisation"] == 1.0
    assert level["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert level["perplexity"] == pytest.approx(np.exp(level["entropy"]))
    assert report["index"]["num_distinct"] == 6 and report["index"]["num_items_moved"] == 0
    assert report["index"]["codebook_sizes"] == [4, 2]
    assert report["index"]["prefixes"][0]["share_of_items_sharing"] == pytest.approx(4 / 6)
    assert report["reconstruction"]["squared_error"] == pytest.approx(4 * 0.05**2 / 6, rel=1e-3)
    assert 0 <= report["neighbours"]["overlap"] <= 1


def test_perfect_codes_keep_all_neighbours_and_the_report_is_json(tmp_path):
    import json

    catalog = tree(125)
    tokenizer = make("rqkmeans", codebook_size=125, num_levels=1).fit(catalog)
    index = ItemIndex.build(tokenizer, catalog, collisions="forbid")
    report = json.loads(json.dumps(diagnose(tokenizer, index, catalog)))
    assert report["neighbours"]["overlap"] == 1.0
    assert report["reconstruction"]["relative_squared_error"] < 1e-9
    assert report["collisions"]["rate"] == 0.0


def test_registered_paths_exist():
    from genrec.tokenizers import COLLISIONS

    for path in [*TOKENIZERS.values(), *COLLISIONS.values()]:
        module, name = path.split(":")
        assert hasattr(importlib.import_module(module), name)
