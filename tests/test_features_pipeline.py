"""Does the embedding stage know its keys, skip what nobody reads, and work in two processes?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import load_artifact
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.synthetic import planted
from genrec.errors import UserError
from genrec.features import FEATURES
from genrec.features.base import FeatureExtractor, Workplace
from genrec.features.hf_encoder import HFEncoder
from genrec.pipeline import stages
from genrec.pipeline.config import check_run_config
from genrec.pipeline.run import Run

LAUNCHER = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
LIMIT_S = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "planted"
    planted(num_items=64, num_users=60, branching=3).save(folder)
    return folder


def moved(data: Path, folder: Path, split: int) -> Path:
    """A data set that differs in the interactions of one split."""
    loaded = Dataset.load(data)
    x = loaded.interactions
    rows = x.item_rows.copy()
    rows[x.splits == split] = np.random.default_rng(0).permutation(rows[x.splits == split])
    other = Interactions(rows, x.offsets, x.timestamps, x.splits, x.num_items)
    Dataset(loaded.catalog, other, dict(loaded.info)).save(folder)
    return folder


def make_run(data: Path, folder: Path, **sections: Any) -> Run:
    config = check_run_config({"name": "x", "data": str(data), **sections})
    return Run(config, out=folder / "run", cache=folder / "cache", device="cpu")


def reused(data: Path, folder: Path, features: Any) -> bool:
    run = make_run(data, folder, features=features)
    run.embed(run.dataset())
    return run.cache.reused["embed"]


def test_only_extractors_that_read_interactions_depend_on_them(data: Path, tmp_path: Path) -> None:
    train, test = (moved(data, tmp_path / name, n) for name, n in (("train", 0), ("test", 2)))
    lsa: Any = {"name": "lsa", "num_dimensions": 8}
    cf = {"name": "collaborative", "width": 8}
    both = {"name": "fusion", "parts": [lsa, cf], "weights": "equal"}
    for features, needs in ((lsa, False), (cf, True), (both, True)):
        assert not reused(data, tmp_path, features)
        assert reused(data, tmp_path, features) and reused(test, tmp_path, features)
        assert reused(train, tmp_path, features) == (not needs)
    kept = [load_artifact(path, kind="vectors") for path in (tmp_path / "cache/vectors").iterdir()]
    assert len(kept) == 5 and not list((tmp_path / "cache").rglob("*.work"))
    blocks = [artifact.extra["blocks"] for artifact in kept if artifact.extra["blocks"]]
    assert [block["name"] for block in blocks[0]] == ["lsa", "collaborative"]
    expected = {"catalog", "interactions"}
    assert {a.config["name"] for a in kept if set(a.upstream) == expected} == {
        "collaborative",
        "fusion",
    }


def test_parts_of_a_fusion_are_made_once(data: Path, tmp_path: Path) -> None:
    lsa: Any = {"name": "lsa", "num_dimensions": 8}
    assert not reused(data, tmp_path, lsa)
    for width in (8, 6):
        parts = [lsa, {"name": "collaborative", "width": width}]
        features = {"name": "fusion", "parts": parts, "weights": "equal"}
        run = make_run(data, tmp_path, features=features)
        catalog = run.embed(run.dataset())
        found = run.cache.reused
        assert found["embed (lsa)"] and not found["embed (collaborative)"] and not found["embed"]
        extractor = stages.component(FEATURES, run.config.features)(run.config.features)
        dataset = run.dataset()
        at_once = extractor.embed(dataset.catalog, dataset.interactions.training())
        assert np.array_equal(catalog.vectors, at_once)
        assert catalog.content_vectors.shape == (64, 8)


def test_files_beside_the_catalogue_are_part_of_the_key(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not reused(data, tmp_path, "lsa") and reused(data, tmp_path, "lsa")
    monkeypatch.setattr(FeatureExtractor, "reads", lambda self, catalog: {"images": "changed"})
    assert not reused(data, tmp_path, "lsa")


@pytest.mark.parametrize("name", ["random", "sequential", "semantic_category"])
def test_without_a_reader_of_vectors_nothing_is_embedded(
    data: Path, tmp_path: Path, name: str
) -> None:
    run = make_run(data, tmp_path, features="lsa", tokenizer=name)
    dataset = run.dataset()
    catalog = run.embed(dataset)
    assert catalog.vectors is None and run.features == {"name": None}
    assert "embed" not in run.cache.seconds and not (tmp_path / "cache" / "vectors").exists()
    tokenizer, index = run.tokenize(dataset, catalog, seed=1)
    assert "vectors" not in tokenizer.upstream and len(index.arrays) > 0
    run.tokenize(dataset, catalog, seed=1)
    assert run.cache.reused["tokenize (seed 1)"]


def test_another_catalogue_is_another_tokenizer(data: Path, tmp_path: Path) -> None:
    """Without vectors, ids and texts decide the codes."""
    loaded = Dataset.load(data)
    table = loaded.catalog.table.with_columns(item_id=pl.col("item_id") + "x")
    other = tmp_path / "other"
    Dataset(Catalog(table), loaded.interactions, dict(loaded.info)).save(other)
    for folder in (data, other):
        run = make_run(folder, tmp_path, tokenizer="random")
        dataset = run.dataset()
        run.tokenize(dataset, run.embed(dataset), seed=1)
        assert not run.cache.reused["tokenize (seed 1)"]


def test_a_stage_without_its_interactions_is_refused(data: Path, tmp_path: Path) -> None:
    config = check_run_config({"data": str(data), "features": "collaborative"}).features
    with pytest.raises(UserError, match="needs the training interactions"):
        stages.embed(tmp_path / "vectors", Dataset.load(data).catalog, config)
    assert not (tmp_path / "vectors").exists()


# -- the command, alone and in two processes --------------------------------------------------


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT that knows the words of the planted titles."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    titles = [str(title) for title in Dataset.load(data).catalog.titles]
    words = ["[UNK]", *sorted({word for title in titles for word in title.split()})]
    level = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=32, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def command(root: Path, launcher: list[str], *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "genrec", "embed", *arguments],
        cwd=root,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_that_share_the_work_get_what_one_gets(data: Path, model: Path, tmp_path: Path) -> None:
    """Two threads stand in for processes: each embeds its share, both get the whole."""
    sections = {"name": "hf_encoder", "model": str(model), "batch_size": 2}
    config = check_run_config({"data": str(data), "features": sections}).features
    catalog, barrier = Dataset.load(data).catalog, threading.Barrier(2, timeout=60)
    shares: dict[int, list[int]] = {0: [], 1: []}

    def work(rank: int) -> np.ndarray:
        extractor = HFEncoder(config)
        encode = extractor._encode
        extractor._encode = lambda texts: (shares[rank].append(len(texts)), encode(texts))[1]  # type: ignore[method-assign]
        place = Workplace(tmp_path, rank, 2, lambda: barrier.wait() and None)
        return extractor.embed(catalog, workplace=place)

    alone = HFEncoder(config).embed(catalog)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (0, 1))
    assert np.array_equal(first, alone) and np.array_equal(second, alone)
    assert sum(shares[0]) == sum(shares[1]) == 32


@pytest.mark.slow
def test_two_processes_embed_what_one_does(
    data: Path, model: Path, root: Path, tmp_path: Path
) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *address]
    encoder = f"{{name: hf_encoder, model: '{model}', batch_size: 2, columns: [title]}}"
    parts = [f"features.parts=[{encoder}, {{name: collaborative, width: 8}}]"]
    parts += ["features.name=fusion", "features.combine=pca", "features.width=12"]
    chosen = check_run_config(
        {
            "data": str(data),
            "features": {
                "name": "fusion",
                "parts": [
                    {
                        "name": "hf_encoder",
                        "model": str(model),
                        "batch_size": 2,
                        "columns": ["title"],
                    },
                    {"name": "collaborative", "width": 8},
                ],
                "combine": "pca",
                "width": 12,
            },
        }
    ).features
    loaded = Dataset.load(data)
    resolved = stages.component(stages.FEATURES, chosen)(chosen).resolve()
    stages.embed(tmp_path / "one", loaded.catalog, resolved, interactions=loaded.interactions)
    command(root, torchrun, str(data), *parts, "--out", str(tmp_path / "two"))
    one, two = (load_artifact(tmp_path / name, kind="vectors") for name in ("one", "two"))
    assert one.arrays["vectors"].shape == (64, 12)
    assert np.array_equal(one.arrays["vectors"], two.arrays["vectors"])
    assert one.config == two.config and one.upstream == two.upstream
    assert not list(tmp_path.glob("*.work"))


def test_a_killed_stage_goes_on_from_its_parts(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = check_run_config(
        {
            "data": str(data),
            "features": {"name": "hf_encoder", "model": str(model), "batch_size": 2},
        }
    ).features
    catalog = Dataset.load(data).catalog
    stages.embed(tmp_path / "whole", catalog, chosen)
    whole, seen = HFEncoder._encode, []

    def dies(self: HFEncoder, texts: Any) -> np.ndarray:
        seen.append(len(texts))
        if len(seen) == 20:
            raise KeyboardInterrupt
        return whole(self, texts)

    monkeypatch.setattr(HFEncoder, "_encode", dies)
    with pytest.raises(KeyboardInterrupt):
        stages.embed(tmp_path / "cut", catalog, chosen)
    assert not (tmp_path / "cut").exists()
    assert len(list((tmp_path / "cut.work").iterdir())) == 2  # 19 batches: two parts of eight
    stages.embed(tmp_path / "cut", catalog, chosen)
    assert len(seen) == 20 + (32 - 16) and not (tmp_path / "cut.work").exists()
    found = [load_artifact(tmp_path / name, kind="vectors") for name in ("whole", "cut")]
    assert np.array_equal(found[0].arrays["vectors"], found[1].arrays["vectors"])
