"""Data of short histories get short histories, from every sequence model, if they are asked to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genrec.config import load_yaml, parse_component
from genrec.configs_folder import find_config
from genrec.data import TRAIN, Interactions
from genrec.data.history_length import HistoryConfig
from genrec.features.sasrec import SASRec, SASRecConfig
from genrec.models import BACKBONES


def users(*lengths: int, num_items: int = 40) -> Interactions:
    """Return training interactions of users with so many each."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.arange(offsets[-1]) % num_items
    return Interactions(
        rows.astype(np.int32),
        offsets,
        np.arange(len(rows), dtype=np.int64),
        np.full(len(rows), TRAIN, np.int8),
        num_items,
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((10, 20, 300), 50),  # half of them fit into 50
        ((50, 51), 50),  # exactly half, exactly so long
        ((51, 51, 50), 100),
        ((100, 101, 400), 200),
        ((101, 100), 100),
        ((500, 600), 200),
        ((0, 0, 0, 300, 300), 200),  # who has no training history does not count
        ((), 50),
    ],
)
def test_histories_are_halved_while_half_of_the_users_fit(lengths, expected):
    config = HistoryConfig(max_history=200, halve_history_to=50)
    found = config.for_histories(users(*lengths))
    assert (found.max_history, found.halve_history_to) == (expected, None)


@pytest.mark.parametrize(("limit", "least"), [(50, 50), (99, 50), (20, 50), (7, 4)])
def test_it_never_falls_below_what_was_asked_for(limit, least):
    config = HistoryConfig(max_history=limit, halve_history_to=least)
    assert config.for_histories(users(1, 1, 1)).max_history == limit


def test_odd_lengths_are_rounded_down():
    config = HistoryConfig(max_history=25, halve_history_to=3)
    assert config.for_histories(users(6, 6)).max_history == 6
    assert config.for_histories(users(7, 7)).max_history == 12
    assert config.for_histories(users(1, 1)).max_history == 3


def test_unasked_nothing_changes():
    config = HistoryConfig(max_history=200)
    assert config.for_histories(users(1, 2)) is config


def test_what_was_decided_is_told(caplog):
    with caplog.at_level("INFO"):
        HistoryConfig(max_history=8, halve_history_to=2).for_histories(users(1, 2, 3, 0))
    assert "the last 2 items instead of 8, into which half of 3 users' training" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        HistoryConfig(max_history=8, halve_history_to=2).for_histories(users(5, 6))
    assert not caplog.text


def test_every_backbone_has_the_rule():
    for name in BACKBONES:
        settings: dict[str, Any] = {"max_history": 200, "halve_history_to": 50}
        if name.startswith("pretrained"):
            settings["source"] = "somewhere"
        if name == "ensemble":
            settings = {"size": 2, "of": {"name": "hierarchical", **settings}}
        _, config = parse_component(BACKBONES, {"name": name, **settings}, path="model")
        long = config.for_histories(users(300, 300))
        short = config.for_histories(users(3, 3))
        assert (long.max_history, short.max_history) == (200, 50)
        # What is saved says what was decided, and decides nothing again.
        saved = parse_component(BACKBONES, short.to_dict(), path="model")[1]
        assert saved.for_histories(users(300, 300)).max_history == 50
        assert config.with_max_history(30).for_histories(users(300)).max_history == 30
        assert config.max_history == 200


def test_the_default_generator_follows_the_rule():
    model = load_yaml(find_config("genrec"))["model"]
    assert (model["max_history"], model["halve_history_to"]) == (200, 50)


def test_sasrec_decides_at_each_fit():
    small = {"d_model": 8, "num_layers": 1, "epochs": 1}
    model = SASRec(SASRecConfig(max_history=16, halve_history_to=4, **small))
    assert model.fit(users(*[4] * 20)).config.max_history == 4
    ruled = model.fit(users(*[8] * 20))
    assert ruled.config.max_history == 8
    plain = SASRec(SASRecConfig(max_history=8, **small)).fit(users(*[8] * 20))
    histories = [np.arange(12), np.arange(3)]
    assert (ruled.scores(histories) == plain.scores(histories)).all()
