"""Which baselines can stand beside a result, and how are they named and set?

A choice is a name ("ease"), or a name with settings ({"name": "ease", "regularization": 500}).
Recipes and figures: docs/evaluation.md. Importing this package imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genrec.config import parse_component
from genrec.errors import ConfigError
from genrec.models.baselines.base import TIE_BREAK, Baseline
from genrec.models.baselines.counting import ItemKNN, Markov, MostPopular, RecentPopular

__all__ = [
    "BASELINES",
    "COUNTING",
    "TIE_BREAK",
    "TRAINED",
    "Baseline",
    "Choice",
    "ItemKNN",
    "Markov",
    "MostPopular",
    "RecentPopular",
    "label",
    "make_baselines",
]

BASELINES = {
    "most_popular": "genrec.models.baselines.counting:MostPopular",
    "recent_popular": "genrec.models.baselines.counting:RecentPopular",
    "item_knn": "genrec.models.baselines.counting:ItemKNN",
    "markov": "genrec.models.baselines.counting:Markov",
    "ease": "genrec.models.baselines.linear:EASE",
    "content_knn": "genrec.models.baselines.content:ContentKNN",
    "sasrec": "genrec.models.baselines.sequence:SASRec",
}
"""Name in YAML -> "module:Class"."""
COUNTING = ("most_popular", "item_knn", "markov")
"""Baselines of every table unless others are named: they take seconds on any data set."""
TRAINED = ("sasrec",)
"""Baselines that take minutes to hours."""

Choice = str | Mapping[str, Any]


def label(choice: Choice) -> str:
    """Return what a choice is called in tables: "ease", or "ease(regularization=500)"."""
    if isinstance(choice, str):
        return choice
    settings = ", ".join(f"{key}={choice[key]}" for key in choice if key != "name")
    name = str(choice.get("name"))
    return f"{name}({settings})" if settings else name


def make_baselines(
    choices: Sequence[Choice], *, path: str = "evaluation.baselines"
) -> dict[str, Baseline]:
    """Return unfitted baselines by label, in order.

    Args:
        choices: names, or mappings with `name` and settings.
        path: where the choices stand, for messages.

    Raises:
        ConfigError: an unknown name or setting, or the same choice twice.
    """
    made: dict[str, Baseline] = {}
    for number, choice in enumerate(choices):
        cls, config = parse_component(BASELINES, choice, path=f"{path}[{number}]")
        if label(choice) in made:
            raise ConfigError(
                f"{path}: got {label(choice)!r} twice. Expected each choice once; leave one out."
            )
        made[label(choice)] = cls(config)
    return made
