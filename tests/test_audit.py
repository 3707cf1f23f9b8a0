"""The leakage audit: clean stages pass, planted leaks are named, splits are checked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import pytest

from genrec.cli import main
from genrec.config import StrictConfig
from genrec.data import Catalog, Dataset, Interactions
from genrec.errors import DataError
from genrec.models.baselines import BASELINES, MostPopular
from genrec.pipeline.audit import audit, replace_items
from genrec.pipeline.config import load_run_config
from genrec.pipeline.split_checks import split_checks
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

STAGES = {
    "vectors",
    "tokenizer",
    "index",
    "generator's weights",
    "generator's selection",
    "calibration",
    "baseline most_popular",
}
QUICK = ("evaluation.baselines=[most_popular]", "evaluation.masked=[true]")


class Numbers(ItemTokenizer):
    """Numbers items by how often they occur: in training, or (a leak) in the whole data folder."""

    class Config(StrictConfig):
        name: Literal["numbers"] = "numbers"
        folder: str | None = None
        seed: int = 0

    decodes = False
    needs = frozenset({"interactions"})

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        assert interactions is not None
        counts = interactions.counts()
        if self.config.folder is not None:
            table = pl.read_parquet(Path(self.config.folder) / "interactions.parquet")
            counts = np.bincount(table["item_row"].to_numpy(), minlength=len(catalog))
        self._rank = np.argsort(np.argsort(-counts, kind="stable")).astype(np.int32)
        return self

    def encode(self, catalog: Catalog) -> np.ndarray:
        return np.stack([self._rank // 16, self._rank % 16], axis=1)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (len(self._rank) // 16 + 1, 16)

    def state(self) -> dict[str, np.ndarray]:
        return {"rank": self._rank}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        self._rank = state["rank"]
        return self


class Restless(MostPopular):
    """A baseline that is never the same twice."""

    class Config(StrictConfig):
        name: Literal["restless"] = "restless"

    calls = 0

    def _scores(self, histories: Any) -> np.ndarray:
        type(self).calls += 1
        return super()._scores(histories) + type(self).calls


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "numbers", f"{__name__}:Numbers")
    monkeypatch.setitem(BASELINES, "restless", f"{__name__}:Restless")


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in found["checks"]}


def test_a_clean_configuration_passes_every_stage(small_config: Path) -> None:
    found = audit(load_run_config(small_config, QUICK), users=40, device="cpu")
    seen = verdicts(found)
    assert found["passed"] and found["leaks"] == [] and found["replaced"] == 2 * 184
    assert {name for name in STAGES if seen[name] == "ok"} == STAGES
    detail = {check["name"]: check["detail"] for check in found["checks"]}
    assert "other validation and test items" in detail["generator's weights"]
    assert "other test items" in detail["calibration"]


def test_a_tokenizer_that_reads_the_data_folder_is_named(
    small_config: Path, ring_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaky = f"tokenizer={{name: numbers, folder: {ring_dataset}}}"
    arguments = ["audit", str(small_config), leaky, *QUICK, "--users", "20", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert stop.value.code == 1 and "failed: tokenizer" in err
    assert found["leaks"] == ["tokenizer"] and verdicts(found)["index"] == "ok"
    assert verdicts(found)["vectors"] == "left out"  # nothing is embedded for it
    detail = next(c["detail"] for c in found["checks"] if c["name"] == "tokenizer")
    assert detail == "changed with other validation and test items: rank."


def test_a_pipeline_that_hands_out_held_out_interactions_is_caught(
    small_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokenizer is clean, until what it is given is not."""
    config = load_run_config(small_config, ["tokenizer={name: numbers}", *QUICK])
    assert audit(config, users=20, device="cpu")["passed"]
    honest = Interactions.training

    def everything(self: Interactions) -> Interactions:
        return replace(self, splits=np.zeros_like(honest(self).splits, shape=len(self)))

    monkeypatch.setattr(Interactions, "training", everything)
    found = audit(config, users=20, device="cpu")
    assert {"training rows", "tokenizer", "generator's weights"} <= set(found["leaks"])
    assert "baseline most_popular" in found["leaks"]
    monkeypatch.setattr(Interactions, "training", honest)


def test_a_stage_that_is_never_the_same_cannot_be_judged(small_config: Path) -> None:
    options = ["tokenizer={name: numbers}", *QUICK, "evaluation.baselines=[restless]"]
    found = audit(load_run_config(small_config, options), users=20, device="cpu")
    assert found["leaks"] == ["baseline restless"]
    assert verdicts(found)["baseline restless"] == "unstable"


def test_nothing_held_out_is_refused(small_config: Path, tmp_path: Path) -> None:
    dataset = data([[0, 1], [1, 2]], [[0, 0], [0, 0]])
    dataset.save(tmp_path / "d")
    with pytest.raises(DataError, match="nothing held out"):
        audit(load_run_config(small_config, [f"data={tmp_path / 'd'}"]))


# -- replacement and splits ---------------------------------------------------------------------


def data(
    items: list[list[int]],
    splits: list[list[int]],
    times: list[list[int]] | None = None,
    split: str = "leave_one_out",
    num_items: int = 6,
) -> Dataset:
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in items])])
    flat = np.concatenate([np.array(t) for t in times]) if times else np.zeros(offsets[-1], int)
    events = Interactions(
        np.concatenate([np.array(rows) for rows in items]).astype(np.int32),
        offsets.astype(np.int64),
        flat.astype(np.int64),
        np.concatenate([np.array(s) for s in splits]).astype(np.uint8),
        num_items,
    )
    ids = pl.DataFrame({"item_id": [str(i) for i in range(num_items)]})
    return Dataset(Catalog(ids), events, {"name": "d", "split": {"name": split}})


LOO = [[0, 0, 1, 2], [0, 1, 2]]
TIMES = [[1, 2, 3, 4], [2, 3, 5]]


def test_only_held_out_items_are_replaced_and_every_one_of_them() -> None:
    dataset = data([[0, 1, 2, 3], [3, 4, 5]], LOO)
    events = dataset.interactions
    for items in ("random", "permuted"):
        for first, wanted in ((1, events.splits >= 1), (2, events.splits == 2)):
            found = replace_items(dataset, first, items, seed=3).interactions  # type: ignore[arg-type]
            assert np.array_equal(found.item_rows[~wanted], events.item_rows[~wanted])
            if items == "random":
                assert (found.item_rows[wanted] != events.item_rows[wanted]).all()
            else:
                assert sorted(found.item_rows[wanted]) == sorted(events.item_rows[wanted])
    with pytest.raises(DataError, match="fewer than two items"):
        replace_items(data([[0, 0, 0]], [[0, 1, 2]], num_items=1), 1, "random", 0)


def by_name(dataset: Dataset) -> dict[str, tuple[str, str]]:
    return {check.name: (check.verdict, check.detail) for check in split_checks(dataset)}


def test_a_good_split_passes() -> None:
    found = by_name(data([[0, 1, 2, 3], [3, 4, 3]], LOO, TIMES))
    assert {verdict for verdict, _ in found.values()} == {"ok", "note"}
    assert "For 1 the item was consumed earlier too" in found["test histories"][1]
    # After the test interaction at time 4 comes none of the training ones, after 5 none either.
    assert "on average 0%" in found["time across users"][1]


def test_without_timestamps_time_is_left_out() -> None:
    found = by_name(data([[0, 1, 2, 3], [3, 4, 5]], LOO))
    for name in ("time within users", "time across users", "events in two splits"):
        assert found[name][0] == "left out"


@pytest.mark.parametrize(
    ("dataset", "name", "message"),
    [
        (data([[0, 1, 2]], [[1, 0, 2]]), "training rows", "1 training interactions come after"),
        (
            data([[0, 1, 1, 2]], [[0, 0, 1, 2]], [[1, 3, 3, 4]]),
            "events in two splits",
            "1 held-out interactions are training interactions too",
        ),
        (
            data([[0, 1, 2, 3]], [[0, 0, 1, 2]], [[1, 4, 3, 5]]),
            "time within users",
            "backwards 1 times, for 1 users",
        ),
        (
            data([[0, 1, 2, 3], [3, 4, 5]], LOO, [[1, 2, 3, 4], [4, 6, 7]], split="global_time"),
            "time across users",
            "interactions are not before the split",
        ),
    ],
)
def test_a_bad_split_is_named(dataset: Dataset, name: str, message: str) -> None:
    verdict, detail = by_name(dataset)[name]
    assert verdict == "leak" and message in detail


def test_a_global_time_split_without_future_passes() -> None:
    times = [[1, 2, 6, 9], [2, 5, 8]]
    found = by_name(data([[0, 1, 2, 3], [3, 4, 5]], LOO, times, split="global_time"))
    assert found["time across users"][0] == "ok"


def test_histories_that_hold_the_target_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data([[0, 1, 2, 3], [3, 4, 5]], LOO, TIMES)
    honest = Interactions.examples

    def one_too_many(self: Interactions, split: Any) -> Any:
        found = honest(self, split)
        longer = [
            np.append(h, t) for h, t in zip(found.histories(), found.target_rows, strict=True)
        ]
        return type(found).of(found.user_rows, found.target_rows, [h[1:] for h in longer])

    monkeypatch.setattr(Interactions, "examples", one_too_many)
    assert by_name(dataset)["test histories"][0] == "leak"
