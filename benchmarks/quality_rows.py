"""Which systems stand in the table of quality, with which settings? It fits and measures nothing.

Counting baselines, SASRec with three losses, the default generator, and variants of both.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec.config import apply_settings, load_yaml
from genrec.configs_folder import find_config
from genrec.errors import UserError
from genrec.evaluation.evaluator import DEFAULT_KS
from genrec.models.baselines import TRAINED
from genrec.pipeline.config import RunConfig, check_run_config

CONFIG = "genrec"  # configs/genrec.yaml
SOURCES = ("demo",)  # ready configurations whose `data` section may be named instead of a folder
_BEAUTY = "genrec prepare sequences FOLDER --columns brand,categories"
PREPARED = {
    "amazon-beauty": _BEAUTY,
    "amazon-beauty-shuffled": f"{_BEAUTY} --ties hash --name amazon-beauty-shuffled",
    "amazon-beauty-6000": f"{_BEAUTY} --sample-users 6000 --name amazon-beauty-6000",
    "lastfm": "genrec prepare sequences LastFM.txt --name lastfm",
}
"""Data set of the table -> what made it of S3-Rec's files (`--out` left out)."""

_SASREC = {
    "name": "sasrec",
    "d_model": 128,
    "d_ff": 256,
    "dropout": 0.5,
    "pre_norm": True,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "average": 0.998,
    "batch_targets": 2048,
    "epochs": 60,
    "patience": 10,
}
_SAMPLED = {**_SASREC, "loss": "sampled_softmax", "num_negatives": 512}
BASELINES: dict[str, dict[str, Any]] = {
    "most_popular": {"name": "most_popular"},
    "item_knn": {"name": "item_knn"},
    "markov": {"name": "markov"},
    "ease": {"name": "ease"},
    # One negative per target, as in the paper; it learns slowly, so it may take longer.
    "sasrec-bce": {**_SASREC, "loss": "bce", "epochs": 200},
    "sasrec-sampled": _SAMPLED,
    "sasrec-softmax": {**_SASREC, "loss": "softmax"},
    "sasrec-sampled-repeat": {**_SAMPLED, "repeat_bias": True},
    "sasrec-default": {"name": "sasrec"},
}
"""Row -> baseline with settings."""

_TEXT_CODES = {"features": {"name": "auto"}}
# For ways that need codes which tell items apart, not groups to choose an item from.
_MANY_CODES = {"tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 256}}
_ENCODER_DECODER = {
    **_TEXT_CODES,
    "model": {"name": "encoder_decoder"},  # its defaults are TIGER's size
    "trainer": {
        "name": "next_item",
        "epochs": 200,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "validate_every": 2,
        "validation_users": 4000,
        "patience": 10,
    },
}
# The same ways at a size for a CPU.
_SMALL = {
    **_ENCODER_DECODER,
    "model": {
        "name": "encoder_decoder",
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 16,
        "d_ff": 256,
    },
    "trainer": {
        "name": "next_item",
        "epochs": 12,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "validate_every": 2,
        "validation_users": 1000,
        "patience": 4,
    },
}
_SMOLLM2: dict[str, Any] = {
    **_TEXT_CODES,
    **_MANY_CODES,
    "model": {
        "name": "pretrained_causal",
        "source": "asset:smollm2",
        "max_history": 20,
        "prefix": "Items that a user took, oldest first:",
        "init": "mean",
        "tuning": {"mode": "lora", "rank": 8, "alpha": 16},
    },
    "trainer": {
        "name": "next_item",
        "epochs": 1,
        "batch_size": 32,
        "accumulation": 4,
        "learning_rate": 1e-3,
        "validation_users": 100,
    },
    "decoding.width": 10,
}
GENERATORS: dict[str, dict[str, Any]] = {
    "genrec": {},
    "genrec-no-content": {"model.content": False},
    "genrec-no-repeat": {"model.repeat_bias": False},
    "genrec-text-codes": _TEXT_CODES,
    "genrec-items-0": {**_MANY_CODES, "model.items_from": 0, "model.num_negatives": 512},
    # Three networks under the same codes: three times the training and the search.
    "genrec-ensemble": {
        "model": {"name": "ensemble", "size": 3, "of": load_yaml(find_config(CONFIG))["model"]}
    },
    "tiger": {**_ENCODER_DECODER, "tokenizer": {"name": "rqvae"}},
    "letter": {
        **_ENCODER_DECODER,
        "tokenizer": {"name": "letter"},
        "trainer.learning_rate": 5e-4,
    },
    "tiger-small": {**_SMALL, "tokenizer": {"name": "rqvae"}},
    "letter-small": {**_SMALL, "tokenizer": {"name": "letter"}},
    # The default's features and training under another backbone: no content, no repeat bias.
    "decoder-only": {
        **_MANY_CODES,
        "model": {
            "name": "decoder_only",
            "max_history": 50,
            "d_model": 128,
            "num_layers": 2,
            "num_heads": 2,
            "d_ff": 256,
            "dropout": 0.3,
        },
    },
    # One pass over the data, which is what an hour of a CPU core allows on MovieLens-100K.
    "smollm2-lora": _SMOLLM2,
    # Small batches and three passes: the same hour for a sample of Amazon Beauty.
    "smollm2-lora-small": {
        **_SMOLLM2,
        "trainer": {
            **_SMOLLM2["trainer"],
            "epochs": 3,
            "batch_size": 8,
            "accumulation": 1,
            "learning_rate": 5e-4,
        },
    },
}
"""Row -> what differs from configs/genrec.yaml: dotted key -> value."""

_EVALUATION = {"evaluation.ks": list(DEFAULT_KS), "evaluation.masked": [False, True]}


def row_names() -> list[str]:
    """Return every row of the table, in its order."""
    return [*BASELINES, *GENERATORS]


@dataclass(frozen=True)
class Order:
    """One piece that is wanted.

    Args:
        row: of `row_names()`.
        seed: of training; 0 for rows that count.
        data: the `data` section of a configuration.
        name: what the data set is called in the table.
    """

    row: str
    seed: int
    data: dict[str, Any]
    name: str

    def __post_init__(self) -> None:
        if self.row not in row_names():
            raise UserError(f"row: got {self.row!r}, expected one of {', '.join(row_names())}.")
        if self.seed and self.row in BASELINES and self.changes["name"] not in TRAINED:
            raise UserError(f"{self.row} has no seed: got {self.seed}, expected 0, once.")

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of the row."""
        return {**BASELINES, **GENERATORS}[self.row]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the outcome beside data and seed, as it was written down."""
        if self.row in BASELINES:
            return self.changes
        sections = apply_settings(load_yaml(find_config(CONFIG)), {**self.changes, **_EVALUATION})
        return {key: part for key, part in sections.items() if key not in ("seeds", "data")}

    @property
    def config(self) -> RunConfig:
        """The checked configuration; a baseline's says nothing but data and protocol."""
        sections = self.settings if self.row in GENERATORS else _EVALUATION
        return check_run_config(
            apply_settings({"name": CONFIG, "data": self.data, "seeds": [self.seed]}, sections)
        )

    @property
    def _folder(self) -> str:
        """The prepared folder without those above it, "" for a source."""
        return Path(self.data.get("dataset", "")).name

    def command(self, dataset_name: str) -> str:
        """Return what makes this piece, but for --seed and --out."""
        known = (name for name in SOURCES if load_yaml(find_config(name))["data"] == self.data)
        source = next(known, None)
        words = [f"python -m benchmarks.quality row {self.row}"]
        words.append(f"--source {source}" if source else f"--data {self._folder}")
        if self.name != dataset_name:
            words.append(f"--name {self.name}")
        return " ".join(words)

    @property
    def run_command(self) -> str | None:
        """The `genrec run` of a generator's row."""
        if self.row not in GENERATORS:
            return None
        changes = dict(self.changes)
        if self.data != load_yaml(find_config(CONFIG))["data"]:
            changes = {"data": self._folder or self.data, **changes}
        words = [f"genrec run configs/{CONFIG}.yaml"]
        for key, value in changes.items():
            words.append(
                shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
            )
        return " ".join(words)
