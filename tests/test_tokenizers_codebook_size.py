"""Small catalogues get small codebooks, from every quantizer, if they are asked to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genrec.config import apply_settings, load_yaml, parse_component
from genrec.configs_folder import find_config
from genrec.data import Catalog
from genrec.pipeline.config import check_run_config
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

QUANTIZERS: list[dict[str, Any]] = [
    {"name": "rqkmeans", "num_levels": 2},
    {"name": "pq", "num_levels": 2},
    {"name": "opq", "num_levels": 2},
    {"name": "rqvae", "num_levels": 2, "hidden_dims": [16], "latent_dim": 4, "num_epochs": 2},
]


def make(**settings: Any) -> ItemTokenizer:
    cls, config = parse_component(TOKENIZERS, settings, path="tokenizer")
    return cls(config)


def cloud(num_items: int) -> Catalog:
    return Catalog.from_vectors(np.random.default_rng(0).normal(size=(num_items, 10)).astype("f4"))


@pytest.mark.parametrize("settings", QUANTIZERS, ids=lambda settings: settings["name"])
@pytest.mark.parametrize(
    ("least", "expected"), [(0, 64), (6, 64), (7, 32), (100, 4), (101, 2), (401, 1)]
)
def test_codes_are_halved_until_each_has_enough_items(settings, least, expected):
    catalog = cloud(400)
    ruled = make(**settings, codebook_size=64, min_items_per_code=least).fit(catalog)
    assert ruled.codebook_sizes == (expected, expected)
    plain = make(**settings, codebook_size=expected).fit(catalog)
    assert (ruled.encode(catalog) == plain.encode(catalog)).all()


@pytest.mark.parametrize("settings", QUANTIZERS, ids=lambda settings: settings["name"])
def test_a_second_fit_decides_anew(settings):
    tokenizer = make(**settings, codebook_size=16, min_items_per_code=8)
    assert tokenizer.fit(cloud(40)).codebook_sizes == (4, 4)
    assert tokenizer.fit(cloud(200)).codebook_sizes == (16, 16)


@pytest.mark.parametrize("settings", QUANTIZERS, ids=lambda settings: settings["name"])
def test_what_was_decided_is_saved_and_told(settings, tmp_path, caplog):
    catalog = cloud(40)
    with caplog.at_level("INFO"):
        fitted = make(**settings, codebook_size=16, min_items_per_code=8).fit(catalog)
    assert (
        "4 codes a level instead of 16, so that 40 items come to at least 8 a code" in caplog.text
    )
    fitted.save(tmp_path / "tokenizer")
    loaded = ItemTokenizer.load(tmp_path / "tokenizer")
    assert loaded.config.codebook_size == 4 and loaded.codebook_sizes == (4, 4)
    assert (loaded.encode(catalog) == fitted.encode(catalog)).all()


@pytest.mark.parametrize("name", ["rqkmeans", "pq", "opq", "rqvae", "letter"])
def test_the_default_generator_takes_every_quantizer_by_name(name):
    settings = apply_settings(load_yaml(find_config("genrec")), {"tokenizer.name": name})
    tokenizer = check_run_config(settings).tokenizer
    assert (tokenizer.name, tokenizer.min_items_per_code) == (name, 32)


def test_the_rule_allows_fewer_different_vectors_than_codes_asked_for():
    few = cloud(10)
    catalog = Catalog.from_vectors(np.repeat(few.vectors, 4, axis=0))
    tokenizer = make(name="rqkmeans", codebook_size=64, num_levels=1, min_items_per_code=4)
    assert tokenizer.fit(catalog).codebook_sizes == (8,)
