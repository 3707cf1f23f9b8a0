"""Which instructions stand in an epoch, and how is each of them worded?

A function of (seed, epoch, place in the epoch) and of nothing else, so that resuming needs no
state. It refuses to know models and tokens.

Shapes: X examples of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, field_validator

from genrec.artifacts import file_checksum, fingerprint
from genrec.config import StrictConfig
from genrec.data.catalog import Catalog
from genrec.data.interactions import Interactions
from genrec.errors import ConfigError, nearest
from genrec.instructions.facts import ItemFacts
from genrec.instructions.tasks import SEQUENTIAL, TASKS, Sources, case_of, known_at
from genrec.instructions.templates import (
    SHIPPED,
    Augmentation,
    Rendered,
    Template,
    load_templates,
)
from genrec.runtime import get_logger

log = get_logger(__name__)

DEFAULT_WEIGHTS: Mapping[str, float] = {
    SEQUENTIAL: 4.0,
    "item_to_index": 1.0,
    "index_to_item": 1.0,
    "titles_to_index": 1.0,
    "history_to_title": 1.0,
    "item_search": 1.0,
    "preference": 1.0,
}
"""The family of LC-Rec; what the data cannot give is left out."""


class MixtureConfig(StrictConfig):
    """Which tasks there are, how much of each, and how they are worded."""

    tasks: dict[str, float] | None = None
    """Weight of each task: its share of the examples. None: the tasks of LC-Rec that the data has
    words for, sequential recommendation four times as often as each of the others."""
    plain: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of sequential examples that are worded as the search words them (`model.prefix` and the
    history); the others take templates."""
    templates: str | None = None
    """Folder with YAML templates that replace the shipped ones of their tasks."""
    augmentation: Augmentation = Augmentation()
    """What may differ between two readings of an example."""
    examples_per_epoch: int | None = Field(default=None, ge=1)
    """None: as many as there are next items to predict in training."""
    max_tokens: int = Field(default=512, ge=16)
    """Tokens of a prompt with its response; a longer one loses the oldest items of its history."""
    max_characters: int = Field(default=200, ge=1)
    """Characters of a title or an attribute."""
    query_column: str | None = None
    """Column of the catalogue with a search text per item; None: queries are drawn from
    attributes."""
    num_candidates: int = Field(default=10, ge=2)
    """Candidates of the task choice, the right one included."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, float] | None) -> dict[str, float] | None:
        for name, weight in (tasks or {}).items():
            if name not in TASKS:
                raise ConfigError(
                    f"{name}: unknown task.{nearest(name, TASKS)} Expected some of "
                    f"{', '.join(TASKS)}."
                )
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name}: got the weight {weight}, expected a number >= 0.")
        if tasks is not None and not sum(tasks.values()) > 0:
            raise ConfigError(f"{SEQUENTIAL}: expected a task with a weight above 0.")
        return tasks

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return digests of what decides the examples beside this and the interactions."""
        files = {name: file_checksum(path) for name, path in sorted(_files(self).items())}
        return {"texts": catalog.fingerprint, "templates": fingerprint(files)}


@dataclass(frozen=True)
class EpochPlan:
    """The examples of an epoch, (X,) each.

    Args:
        tasks: int64, which of the mixture's tasks.
        places: int64, what of the data (see `case_of`).
    """

    tasks: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True)
class Example:
    """A worded example.

    Args:
        task: which of the mixture's tasks.
        text: the pieces. A plain example has the history as its prompt, and no words.
        plain: worded as the search words it.
    """

    task: int
    text: Rendered
    plain: bool


class Mixture:
    """Instructions of several tasks.

    Args:
        config: which.
        catalog: items with their words.
        interactions: training interactions only.
        max_history: items of a history at most.

    Raises:
        ConfigError: templates that are not right, or a task that was asked for by name and that the
            data has nothing for.
    """

    def __init__(
        self,
        config: MixtureConfig,
        catalog: Catalog,
        interactions: Interactions,
        max_history: int,
    ) -> None:
        self.config = config
        facts = ItemFacts(
            catalog, max_characters=config.max_characters, query_column=config.query_column
        )
        self.sources = Sources(facts, interactions, max_history, config.num_candidates)
        wanted = dict(DEFAULT_WEIGHTS if config.tasks is None else config.tasks)
        wanted = {name: weight for name, weight in wanted.items() if weight > 0}
        templates = load_all(config)
        self._templates = {name: templates[name] for name in wanted}
        pools = {name: self._pool(name) for name in wanted}
        self._check(pools)
        self.tasks = tuple(name for name in wanted if len(pools[name]))
        self.weights = np.array([wanted[name] for name in self.tasks])
        self._pools = [pools[name] for name in self.tasks]
        self.size = config.examples_per_epoch or max(1, len(self._positions()))

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return which examples stand in an epoch: as many of each task as its weight says.

        Within a task no example comes twice before all have come once.
        """
        tasks, places = [], []
        for number, count in enumerate(apportion(self.weights, self.size)):
            rng = np.random.default_rng([seed, epoch, number, 4])
            pool = self._pools[number]
            rounds = [rng.permutation(pool) for _ in range(-(-int(count) // len(pool)))]
            places.append(np.concatenate([*rounds, pool[:0]])[:count])
            tasks.append(np.full(count, number))
        return EpochPlan(np.concatenate(tasks), np.concatenate(places))

    def example(
        self, plan: EpochPlan, number: int, seed: int, epoch: int, *, max_history: int | None = None
    ) -> Example:
        """Return one example of an epoch.

        Args:
            plan: of that epoch.
            number: which.
            seed: as of the plan.
            epoch: as of the plan.
            max_history: items of its history at most, if fewer than the mixture's.
        """
        rng = np.random.default_rng([seed, epoch, number, 5])
        task, place = int(plan.tasks[number]), int(plan.places[number])
        name = self.tasks[task]
        limit = self.sources.max_history if max_history is None else max_history
        case = case_of(self.sources, TASKS[name], place, limit)
        templates = self._templates[name]
        if name == SEQUENTIAL and (rng.random() < self.config.plain or not templates):
            text = Rendered(tuple(case.history.tolist()), (case.target,))
            return Example(task, text, plain=True)
        known = {
            key: value
            for key, value in TASKS[name].fill(self.sources, case, rng).items()
            if value is not None
        }
        fitting = [t for t in templates if t.placeholders <= set(known)]
        chosen = fitting[int(rng.integers(len(fitting)))]
        return Example(task, chosen.render(known, self.config.augmentation, rng), plain=False)

    def history_lengths(self, plan: EpochPlan) -> np.ndarray:
        """Return how many items each example's history has, (X,) int64."""
        events = self.sources.interactions
        users = np.searchsorted(events.offsets, plan.places, side="right") - 1
        before = plan.places - events.offsets[np.clip(users, 0, events.num_users - 1)]
        about_items = np.array([TASKS[name].about == "items" for name in self.tasks])
        lengths = np.clip(before, 0, self.sources.max_history)
        return np.where(about_items[plan.tasks], 0, lengths)

    def _positions(self) -> np.ndarray:
        """Return the places of all interactions that something comes before."""
        events = self.sources.interactions
        keep = np.ones(len(events), dtype=bool)
        keep[events.offsets[:-1][np.diff(events.offsets) > 0]] = False
        return np.flatnonzero(keep)

    def _pool(self, name: str) -> np.ndarray:
        """Return the places for which some template of a task can be filled, (P,) int64."""
        task = TASKS[name]
        if task.about == "items":
            places = np.arange(len(self.sources.facts))
        else:
            places = self._positions()
        if name == SEQUENTIAL:
            return places
        known = known_at(self.sources, task, places)
        asked = [template.placeholders for template in self._templates[name]]
        fitting = [np.all([known[key] for key in sorted(names)], axis=0) for names in asked]
        return places[np.any(fitting, axis=0)]

    def _check(self, pools: Mapping[str, np.ndarray]) -> None:
        empty = [name for name, pool in pools.items() if not len(pool)]
        if self.config.tasks is not None and empty:
            raise ConfigError(
                f"trainer.mixture.tasks.{empty[0]}: got a weight, but the data has no example for "
                f"it; it needs {TASKS[empty[0]].needs}. Leave the task out."
            )
        if empty:
            log.info("instructions: the data has nothing for %s", ", ".join(empty))


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers that add up to `total`, as near to the weights as can be, int64.

    >>> apportion(np.array([2.0, 1.0, 1.0]), 10).tolist()
    [5, 3, 2]
    """
    exact = weights / weights.sum() * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]
    counts[rest] += 1
    return counts


def _files(config: MixtureConfig) -> dict[str, Path]:
    """Return the files of templates by name; a user's file stands for the shipped one."""
    files = {path.name: path for path in SHIPPED.glob("*.yaml")}
    if config.templates is None:
        return files
    folder = Path(config.templates)
    own = {path.name: path for path in folder.glob("*.yaml")} if folder.is_dir() else {}
    if not own:
        raise ConfigError(
            f"trainer.mixture.templates: got {config.templates!r}, expected a folder with YAML "
            "files of templates. See docs/instructions.md."
        )
    return {**files, **own}


def load_all(config: MixtureConfig) -> dict[str, tuple[Template, ...]]:
    """Return the templates of every task; a user's file replaces the shipped ones of its task.

    Raises:
        ConfigError: a folder without templates, or a template that is not right.
    """
    slots = {name: task.slots for name, task in TASKS.items()}
    found: dict[str, tuple[Template, ...]] = {}
    own = set() if config.templates is None else set(Path(config.templates).glob("*.yaml"))
    for path in sorted(_files(config).values(), key=lambda p: (p in own, p.name)):
        task, templates = load_templates(path, slots)
        found[task] = templates
    return found
