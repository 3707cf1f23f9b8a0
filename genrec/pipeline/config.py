"""What a run is told: the sections of a configuration file, checked as a whole.

Generic parsing is in `genrec.config`; what each component can be told is in its own `Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from genrec.calibration import CALIBRATORS
from genrec.config import StrictConfig, apply_overrides, load_yaml, parse, parse_component
from genrec.data import SOURCES
from genrec.data.prepare import PrepareConfig
from genrec.errors import ConfigError, nearest
from genrec.features import FEATURES
from genrec.models import BACKBONES
from genrec.models.baselines import COUNTING, make_baselines
from genrec.pipeline.indexing import IndexConfig
from genrec.tokenizers import TOKENIZERS
from genrec.trainers import TRAINERS
from genrec.trainers.tracking import TrackingConfig


class DecodingConfig(StrictConfig):
    """Constrained beam search at evaluation and in the bundle."""

    width: int = Field(default=50, ge=1)
    """Beam width; also the depth of the lists that are calibrated."""
    scoring: Literal["renormalized", "level", "raw"] = "renormalized"
    """What a code's probability is among: the codes that lead to an item, all codes of the level,
    or all tokens (docs/decoding.md)."""
    batch_size: int = Field(default=64, ge=1)
    """Requests searched together (speed and memory only)."""


class EvaluationConfig(StrictConfig):
    """Protocol of the results table."""

    ks: tuple[int, ...] = (5, 10)
    """Cut-offs of recall and NDCG."""
    masked: tuple[bool, ...] = (True, False)
    """Seen items left out of the ranking (true), kept in (false), or both."""
    baselines: tuple[str | dict[str, Any], ...] = COUNTING
    """Baselines in the same table: names, or names with settings, e.g.
    [most_popular, {name: ease, regularization: 500}]."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of users behind each interval."""


class IncrementalConfig(StrictConfig):
    """Three models of one data set that is split by time: stale, updated, retrained."""

    old_share: float = Field(default=0.7, gt=0, lt=1)
    """Share of the training interactions, the oldest, that the stale model has."""
    valid_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of those, the latest, that the stale model is validated by."""
    update: dict[str, Any] = Field(default_factory=dict)
    """Options of the `incremental` trainer that differ from `trainer`, e.g. replay, epochs,
    learning_rate."""


class DataConfig(StrictConfig):
    """Where interactions come from: a prepared folder, or a source to prepare."""

    dataset: str | None = None
    """Folder that `genrec prepare` wrote (shorthand: `data: FOLDER`)."""
    prepare: PrepareConfig = PrepareConfig()
    """Filters and split; used with `source` only."""


SECTIONS: dict[str, type[StrictConfig]] = {
    "index": IndexConfig,
    "decoding": DecodingConfig,
    "evaluation": EvaluationConfig,
    "tracking": TrackingConfig,
}
INCREMENTAL = "incremental"
COMPONENTS: dict[str, tuple[Mapping[str, str], str]] = {
    "features": (FEATURES, "auto"),
    "tokenizer": (TOKENIZERS, "rqkmeans"),
    "model": (BACKBONES, "decoder_only"),
    "trainer": (TRAINERS, "next_item"),
    "calibration": (CALIBRATORS, "temperature"),
}


@dataclass(frozen=True)
class RunConfig:
    """A complete, checked configuration."""

    name: str
    seeds: tuple[int, ...]
    data: DataConfig
    source: StrictConfig | None
    features: StrictConfig
    tokenizer: StrictConfig
    index: IndexConfig
    model: StrictConfig
    trainer: StrictConfig
    decoding: DecodingConfig
    calibration: StrictConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    incremental: IncrementalConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, in the order of a configuration file."""
        result: dict[str, Any] = {"name": self.name, "seeds": list(self.seeds)}
        if self.data.dataset is not None:
            result["data"] = {"dataset": self.data.dataset}
        elif self.source is not None:
            prepare = self.data.prepare.to_dict()
            result["data"] = {"source": self.source.to_dict(), "prepare": prepare}
        for field in fields(self)[4:]:
            if (part := getattr(self, field.name)) is not None:
                result[field.name] = part.to_dict()
        return result

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides and check everything.

    Raises:
        ConfigError: every problem found, a line each, with dotted paths.
    """
    return check_run_config(apply_overrides(load_yaml(path), overrides))


def check_run_config(data: Mapping[str, Any]) -> RunConfig:
    """Check plain data against all sections; raises `ConfigError` listing every problem."""
    problems: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ConfigError as error:
            problems.append(str(error))
            return None

    known = ["name", "seeds", "data", *SECTIONS, *COMPONENTS, INCREMENTAL]
    for key in data:
        if key not in known:
            problems.append(
                f"{key}: unknown key.{nearest(key, known)} Valid keys: {', '.join(known)}."
            )
    parts: dict[str, Any] = {
        "name": attempt(lambda: _name(data.get("name", "run"))),
        "seeds": attempt(lambda: _seeds(data.get("seeds", [1]))),
    }
    parts["data"], parts["source"] = attempt(lambda: _data(data.get("data"))) or (None, None)
    for section, model in SECTIONS.items():
        parts[section] = attempt(
            lambda model=model, section=section: parse(  # type: ignore[misc]
                model, _section(data, section), path=section
            )
        )
    for section, (registry, default) in COMPONENTS.items():
        parts[section] = attempt(
            lambda registry=registry, default=default, section=section: parse_component(  # type: ignore[misc]
                registry, {"name": default, **_section(data, section)}, path=section
            )[1]
        )
    if INCREMENTAL in data:
        parts[INCREMENTAL] = attempt(lambda: _incremental(data, parts["trainer"]))
    if parts["evaluation"] is not None:
        attempt(lambda: make_baselines(parts["evaluation"].baselines))
    if not problems and parts["decoding"].width < max(parts["evaluation"].ks):
        problems.append(
            f"decoding.width: got {parts['decoding'].width}, expected at least "
            f"{max(parts['evaluation'].ks)}, the largest of evaluation.ks."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return RunConfig(**parts)


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if value is None:
        return {}
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: got {value!r}, expected a section (key: value lines).")
    return dict(value)


def _incremental(data: Mapping[str, Any], trainer: Any) -> IncrementalConfig:
    """Return the section, once the trainer that it makes has been checked."""
    found = parse(IncrementalConfig, _section(data, INCREMENTAL), path=INCREMENTAL)
    if trainer is not None:
        update_trainer(trainer, found, start_from="", new_from=0)
    return found


def update_trainer(
    trainer: StrictConfig, incremental: IncrementalConfig, *, start_from: str, new_from: int
) -> Any:
    """Return the configuration of the trainer that goes on: that of `trainer`, with `update`.

    Raises:
        ConfigError: a trainer other than next_item, or an option that there is not.
    """
    plain = trainer.to_dict()
    if plain["name"] != "next_item":
        raise ConfigError(
            f"trainer.name: got {plain['name']!r} with a section {INCREMENTAL!r}, expected "
            "'next_item': the update goes on as the models began."
        )
    fixed = {"name": INCREMENTAL, "start_from": start_from, "new_from": new_from}
    section = {**plain, **incremental.update, **fixed}
    return parse_component(TRAINERS, section, path=f"{INCREMENTAL}.update")[1]


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value or value.startswith("."):
        raise ConfigError(f"name: got {value!r}, expected a short name without slashes.")
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else value
    good = isinstance(values, list) and values and all(type(v) is int and v >= 0 for v in values)
    if not good or len(set(values)) != len(values):
        raise ConfigError(
            f"seeds: got {value!r}, expected different integers >= 0, e.g. [1, 2, 3]."
        )
    return tuple(values)


def _data(value: Any) -> tuple[DataConfig, StrictConfig | None]:
    if isinstance(value, str):
        value = {"dataset": value}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"data: got {value!r}, expected a prepared folder (data=FOLDER, see `genrec prepare`) "
            "or a section with `source`."
        )
    rest = {key: part for key, part in value.items() if key != "source"}
    unknown = [key for key in rest if key not in DataConfig.model_fields]
    if unknown:
        known = [*DataConfig.model_fields, "source"]
        raise ConfigError(
            f"data.{unknown[0]}: unknown key.{nearest(unknown[0], known)} "
            f"Valid keys here: {', '.join(known)}."
        )
    config = parse(DataConfig, rest, path="data")
    if (config.dataset is None) == (value.get("source") is None):
        raise ConfigError("data: expected either `dataset` (a prepared folder) or `source`.")
    if config.dataset is not None:
        return config, None
    return config, parse_component(SOURCES, value["source"], path="data.source")[1]
