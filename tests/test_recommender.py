"""The Recommender: ids in, ids out, honest scores, and every kind of strange request."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from genrec import Recommender
from genrec.artifacts import load_artifact
from genrec.bundle import load_model
from genrec.errors import ArtifactError, MismatchError, UserError
from genrec.item_index import ItemIndex


@pytest.fixture(scope="module")
def recommender(small_run: Path) -> Recommender:
    return Recommender.from_pretrained(small_run / "bundle", device="cpu")


HISTORIES = [["50", "51", "52"], ["7"], ["100", "101", "102", "103", "104", "105", "106", "107"]]


def test_lists_are_full_sorted_and_of_known_items(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, k=10)
    assert found.item_ids.shape == found.scores.shape == found.probabilities.shape == (3, 10)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert (np.diff(found.probabilities, axis=1) <= 0).all()
    for history, items in zip(HISTORIES, found.item_ids, strict=True):
        assert len(set(items)) == 10 and set(items) <= set(recommender.item_ids)
        assert not set(items) & set(history)


def test_the_catalogue_is_as_in_the_raw_data(recommender: Recommender) -> None:
    assert recommender.item_ids == [str(i) for i in range(184)]
    assert recommender.titles(["50", None]) == ["Ring item 50", None]


def test_scores_of_the_whole_catalogue_are_probabilities(recommender: Recommender) -> None:
    scores = recommender.score([HISTORIES[0], []], [recommender.item_ids] * 2)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1.0, atol=1e-4)


def test_search_scores_are_the_exact_log_probabilities(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, k=12, exclude_seen=False)
    exact = recommender.score(HISTORIES, [list(items) for items in found.item_ids])
    np.testing.assert_allclose(found.scores, exact, atol=1e-4)


def test_a_beam_as_wide_as_the_catalogue_is_the_full_ranking(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, k=184, width=184, exclude_seen=False)
    scores = recommender.score(HISTORIES, [recommender.item_ids] * 3)
    assert found.certified.all()
    for row in range(3):
        order = np.lexsort((np.arange(184), -scores[row]))
        best = scores[row][order]
        np.testing.assert_allclose(found.scores[row], best, atol=1e-4)
        clear = np.abs(np.diff(best)) > 1e-4  # compare order where scores are not nearly tied
        same = found.item_ids[row] == np.array(recommender.item_ids)[order]
        assert same[1:-1][clear[:-1] & clear[1:]].all()


def test_a_user_alone_gets_the_same_list_as_in_a_batch(recommender: Recommender) -> None:
    together = recommender.recommend(HISTORIES, k=5)
    for row, history in enumerate(HISTORIES):
        alone = recommender.recommend([history], k=5)
        assert (alone.item_ids[0] == together.item_ids[row]).all()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)
        np.testing.assert_allclose(alone.probabilities[0], together.probabilities[row], atol=1e-5)


def test_k_cuts_the_list_and_changes_nothing_else(recommender: Recommender) -> None:
    five, ten = recommender.recommend(HISTORIES, k=5), recommender.recommend(HISTORIES, k=10)
    assert (five.item_ids == ten.item_ids[:, :5]).all()
    np.testing.assert_array_equal(five.probabilities, ten.probabilities[:, :5])


def test_candidates_and_exclude_are_kept_to(recommender: Recommender) -> None:
    wanted = ["3", "60", "9", "120"]
    found = recommender.recommend(HISTORIES, k=6, candidates=wanted)
    for items in found.item_ids:
        assert set(items[:4]) == set(wanted) and items[4] is None and items[5] is None
    assert np.isneginf(found.scores[:, 4:]).all() and (found.probabilities[:, 4:] == 0).all()
    scores = recommender.score(HISTORIES, [list(items[:4]) for items in found.item_ids])
    np.testing.assert_allclose(found.scores[:, :4], scores, atol=1e-4)
    np.testing.assert_allclose(found.probabilities.sum(1), 1.0, atol=1e-4)
    own = recommender.recommend(HISTORIES[:2], k=3, candidates=[["3"], ["4", "5"]])
    assert own.item_ids[0].tolist() == ["3", None, None] and set(own.item_ids[1][:2]) == {"4", "5"}
    best = recommender.recommend(HISTORIES, k=2).item_ids[:, 0]
    without = recommender.recommend(HISTORIES, k=5, exclude=[[item] for item in best])
    assert all(b not in items for b, items in zip(best, without.item_ids, strict=True))


def test_an_exhausted_catalogue_gives_an_empty_list(recommender: Recommender) -> None:
    found = recommender.recommend([["1"]], k=3, candidates=["1", "2"], exclude=["2"])
    assert found.item_ids[0].tolist() == [None] * 3 and (found.probabilities == 0).all()


def test_more_than_there_is_is_padded(recommender: Recommender) -> None:
    found = recommender.recommend([["1", "2"]], k=200)
    assert found.item_ids.shape == (1, 200)
    assert [item is None for item in found.item_ids[0]] == [False] * 182 + [True] * 18


def test_empty_histories_and_empty_requests(recommender: Recommender) -> None:
    found = recommender.recommend([[]], k=4)
    assert found.item_ids.shape == (1, 4) and None not in found.item_ids[0]
    assert len(recommender.recommend([], k=4)) == 0
    assert recommender.score([], []).shape == (0, 0)


def test_unknown_history_items_are_skipped_with_one_warning(
    recommender: Recommender, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="genrec"):
        found = recommender.recommend([["50", "nope", "51"], ["other"]], k=3)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        len(warnings) == 1 and "nope" in warnings[0].message and "2 item(s)" in warnings[0].message
    )
    known = recommender.recommend([["50", "51"], []], k=3)
    assert (found.item_ids == known.item_ids).all()
    with pytest.raises(UserError, match="'nope'"):
        recommender.recommend([["50", "nope"]], k=3, missing="error")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 0}, "k: got 0, expected an integer >= 1"),
        ({"k": 5, "width": 0}, "width: got 0"),
        ({"k": 5, "width": 3}, "width: got 3, expected at least k=5"),
        ({"exclude": ["nope"]}, "'nope'"),
        ({"candidates": ["nope"]}, "'nope'"),
        ({"candidates": [["1"]]}, "1 lists for 3 histories"),
        ({"missing": "ignore"}, "missing: got 'ignore'"),
    ],
)
def test_bad_requests_are_refused(recommender: Recommender, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recommender.recommend(HISTORIES, **arguments)


def test_text_instead_of_lists_is_refused(recommender: Recommender) -> None:
    for histories in ("50", ["50", "181"]):
        with pytest.raises(UserError, match="list of lists"):
            recommender.recommend(histories)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one list per history"):
        recommender.score([["1"]], [["2"], ["3"]])
    with pytest.raises(UserError, match="'nope'"):
        recommender.score([["1"]], [["nope"]])


def test_candidate_lists_of_several_lengths_are_padded(recommender: Recommender) -> None:
    scores = recommender.score([["1"], ["2"]], [["3", "4", "5"], ["6"]])
    assert scores.shape == (2, 3) and np.isneginf(scores[1, 1:]).all()
    assert np.isfinite(scores[0]).all() and np.isfinite(scores[1, 0])


def test_a_model_that_does_not_fit_its_index_names_both_fingerprints(small_run: Path) -> None:
    index = ItemIndex.load(small_run / "bundle" / "index")
    other = ItemIndex(index.item_ids, index.codes[::-1], index.codebook_sizes)
    with pytest.raises(MismatchError) as error:
        load_model(small_run / "bundle" / "model", other)
    assert index.fingerprint in str(error.value) and other.fingerprint in str(error.value)


def test_a_damaged_bundle_is_refused(small_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small_run / "bundle", tmp_path / "b")
    weights = tmp_path / "b" / "model" / "arrays.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="damaged"):
        Recommender.from_pretrained(tmp_path / "b")
    with pytest.raises(ArtifactError, match="does not exist"):
        Recommender.from_pretrained(tmp_path / "none")
    with pytest.raises(ArtifactError, match="expected 'bundle'"):
        Recommender.from_pretrained(small_run / "bundle" / "model")


def test_no_raw_user_id_and_no_absolute_path_is_in_the_bundle(small_run: Path) -> None:
    manifest = json.loads((small_run / "bundle" / "manifest.json").read_text())
    assert load_artifact(small_run / "bundle", kind="bundle").fingerprint == manifest["fingerprint"]
    text = "".join(
        path.read_text() for path in (small_run / "bundle").rglob("*.json")
    ) + json.dumps(manifest)
    assert "user_id" not in text and str(small_run.parent.parent) not in text


def test_an_unavailable_device_is_said(small_run: Path) -> None:
    with pytest.raises(UserError, match="device: got 'nonsense'"):
        Recommender.from_pretrained(small_run / "bundle", device="nonsense")
