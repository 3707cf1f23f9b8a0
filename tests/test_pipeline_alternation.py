"""Textual ids that learn from the recommender: the rounds of a run, and that they are reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from genrec.data.synthetic import planted
from genrec.item_index import ItemIndex
from genrec.pipeline.config import check_run_config
from genrec.pipeline.run import Run
from genrec.tokenizers.base import ItemTokenizer

TOKENIZER = {
    "name": "textual",
    "vocabulary_size": 300,
    "d_model": 16,
    "d_ff": 32,
    "num_layers": 1,
    "num_epochs": 2,
    "alternation": {"rounds": 1, "learning_rate": 0.01},
}


def test_a_round_trains_the_generator_names_items_again_and_trains_on_that(
    small_config: Path, tmp_path: Path
) -> None:
    data = planted(48, num_users=40, seed=3, branching=3)
    data.save(tmp_path / "data")
    settings: dict[str, Any] = yaml.safe_load(small_config.read_text())
    settings |= {"data": str(tmp_path / "data"), "tokenizer": TOKENIZER, "seeds": [1]}
    settings["index"] = {"collisions": "first_unused"}
    config = check_run_config(settings)

    def execute() -> tuple[Run, dict[str, Any]]:
        run = Run(config, out=tmp_path / "out", cache=tmp_path / "cache", device="cpu")
        return run, run.execute()

    run, results = execute()
    labels = list(run.cache.seconds)
    assert "alternate (seed 1, 1)" in labels and "index (seed 1, 1)" in labels
    tokenizers = [ItemTokenizer.load(p) for p in (tmp_path / "cache" / "tokenizer").iterdir()]
    states = [t.state() for t in tokenizers]
    assert len(states) == 2
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])
    bundle = tmp_path / "out" / "bundle"
    index = ItemIndex.load(bundle / "index")
    assert index.shared_vocabulary and len(index) == 48
    assert ItemTokenizer.load(bundle / "tokenizer").codebook_sizes[0] <= index.codebook_sizes[0]
    again, repeated = execute()
    assert all(again.cache.reused.values()) and repeated["rows"] == results["rows"]
