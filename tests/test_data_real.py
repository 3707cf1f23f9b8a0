"""Do the real data sets beside the checkout come out with the counts that the literature has?"""

from __future__ import annotations

import numpy as np
import pytest

from genrec import assets
from genrec.data import Dataset
from genrec.data.doctor import examine
from genrec.data.prepare import prepare


def test_amazon_beauty(beauty_folder, tmp_path):
    dataset = prepare({"name": "sequences", "path": str(beauty_folder)}, out=tmp_path / "beauty")
    counts = dataset.info["counts"]
    assert (counts["users"], counts["items"], counts["kept"]) == (22363, 12101, 198502)
    assert counts["train"] == 198502 - 2 * 22363
    assert dataset.info["source_facts"]["users_without_timestamps"] == 226
    assert dataset.info["source_facts"]["users_with_misaligned_timestamps"] == 0
    first = (beauty_folder / "sequences.txt").read_text().splitlines()[1].split()
    ids = dataset.catalog.item_ids
    assert [ids[row] for row in dataset.interactions.user(1)] == first[1:]
    found = {finding.code: finding for finding in examine(Dataset.load(tmp_path / "beauty"))}
    assert found["ties"].count == 75996
    assert "asin" in found["ties_sorted_by_item"].message
    assert found["items_only_in_test"].count == 33
    assert not [finding for finding in found.values() if finding.level == "error"]


@pytest.fixture(scope="module")
def ml_100k() -> dict[str, str]:
    found = assets.find("ml-100k")
    if found is None:
        pytest.skip("needs the asset ml-100k: genrec assets fetch ml-100k")
    return {"name": "recbole", "path": str(found)}


def test_ml_100k(ml_100k):
    dataset = prepare(ml_100k)
    counts = dataset.info["counts"]
    assert (counts["read"], counts["dropped_duplicates"]) == (100000, 0)
    assert (counts["users"], counts["items"], counts["kept"]) == (943, 1349, 99287)
    assert dataset.info["tie_statistics"]["users_tied_at_the_end"] == 416  # 44% of the users
    lengths = np.diff(dataset.interactions.offsets)
    assert np.median(lengths) == 64
    assert dataset.catalog.titles[dataset.catalog.item_ids.index("50")] == "Star Wars"


def test_ml_100k_most_popular_and_markov_match_the_reference(ml_100k):
    """The table of docs/evaluation.md, hash tie-break, not masked: Recall@10 .0435 and .1145."""
    events = prepare(ml_100k).interactions
    training = events.training()
    popularity = training.counts()
    follows = np.zeros((events.num_items, events.num_items))
    same = np.diff(training.user_rows) == 0
    np.add.at(follows, (training.item_rows[:-1][same], training.item_rows[1:][same]), 1)
    follows += 1e-6 * popularity / popularity.sum()
    examples = events.examples("test")
    last = examples.flat[examples.offsets[1:] - 1]
    for scores_BN, reference in (
        (np.broadcast_to(popularity, (len(last), events.num_items)), 0.0435),
        (follows[last], 0.1145),
    ):
        target = np.take_along_axis(scores_BN, examples.target_rows[:, None], axis=1)
        ties = (scores_BN == target).sum(axis=1)
        rank = (scores_BN > target).sum(axis=1) + (ties + 1) / 2  # expected rank
        assert round(float((rank <= 10).mean()), 4) == reference
