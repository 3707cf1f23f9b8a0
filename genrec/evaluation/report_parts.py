"""What can a report show beside results.json? Plain values that the sections of a report read.

It knows how nothing here is computed; `genrec.pipeline.reporting` collects the parts of a run.

Shapes: P items on a map, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """One training run.

    Args:
        label: e.g. "seed 0".
        train: (step, training loss in nats per target) pairs.
        valid: (step, validation NDCG@10) pairs.
    """

    label: str
    train: Sequence[tuple[float, float]] = ()
    valid: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class SharedPrefix:
    """The item of a history whose semantic ID begins most like that of a recommended item.

    Args:
        item_id: of the history's item.
        title: of it, where there is one.
        codes: the codes that both begin with; empty where not even the first is shared.
        num_levels: codes of a whole semantic ID.
    """

    item_id: str
    title: str | None = None
    codes: Sequence[int] = ()
    num_levels: int = 0


@dataclass(frozen=True)
class ListedItem:
    """One item of a sample.

    Args:
        item_id: external id.
        title: shown instead of the id where there is one.
        probability: calibrated, None in a history.
        is_target: whether it is what the user consumed next.
        shared: what in the history it resembles; None in a history, or where nothing is known.
    """

    item_id: str
    title: str | None = None
    probability: float | None = None
    is_target: bool = False
    shared: SharedPrefix | None = None


@dataclass(frozen=True)
class Sample:
    """One user's list.

    Args:
        label: e.g. "User 1"; no external user ids.
        history: last items, oldest first.
        recommended: best first.
        target: what the user consumed next, where known.
    """

    label: str
    history: Sequence[ListedItem]
    recommended: Sequence[ListedItem]
    target: ListedItem | None = None


@dataclass(frozen=True, eq=False)
class ItemMap:
    """Items as points.

    Args:
        points_P2: (P, 2) places.
        first_codes_P: (P,) first code of each item.
        names: codes that are drawn larger -> words for the legend.
        method: how the places were found, in words.
    """

    points_P2: np.ndarray
    first_codes_P: np.ndarray
    names: Mapping[int, str]
    method: str = "first two principal components of the item vectors"


@dataclass(frozen=True)
class GroupSection:
    """A metric by group of users, for several systems.

    Args:
        title: what makes the groups, e.g. "History length".
        metric: e.g. "recall@10".
        masked: seen items left out.
        systems: name -> lines of `genrec.evaluation.groups.group_figures`.
    """

    title: str
    metric: str
    masked: bool
    systems: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class ReportParts:
    """What a report shows beside results.json; everything is optional.

    Args:
        title: of the page, or of the run's part of it.
        curves: training curves, one per seed.
        code_usage: for each level, how many items hold each code, (K,) ints.
        item_map: items as points, coloured by their first code.
        groups: a metric by groups of users.
        samples: a few users.
        dataset_card: facts about the data set; default: results["dataset"].
        dataset_info: how the data set was prepared, shown on demand.
        findings: what the data checks said: mappings with `level` and `message`.
        config_yaml: resolved configuration.
        command: how the run was started.
        notes: sentences printed below the headline (a fallback that was used, say).
        prefix: put before every id, where a page holds several runs.
    """

    title: str = "genrec report"
    curves: Sequence[Curve] = ()
    code_usage: Sequence[np.ndarray] = ()
    item_map: ItemMap | None = None
    groups: Sequence[GroupSection] = ()
    samples: Sequence[Sample] = ()
    dataset_card: Mapping[str, Any] | None = None
    dataset_info: Mapping[str, Any] | None = None
    findings: Sequence[Mapping[str, Any]] = ()
    config_yaml: str = ""
    command: str = ""
    notes: Sequence[str] = field(default=())
    prefix: str = ""
