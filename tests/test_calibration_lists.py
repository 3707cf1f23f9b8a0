"""Re-ranking lists: the identity at strength 0, slow twins, optimality, and what sweeps do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import Recommender, runtime
from genrec.calibration.lists import RERANKERS
from genrec.calibration.lists.base import Candidates, ItemFacts, relevance
from genrec.calibration.lists.diversity import MMR, XQuAD
from genrec.calibration.lists.exposure import Exposure
from genrec.calibration.lists.popularity import LongTail, PopularityPenalty, popularity_groups
from genrec.calibration.lists.steck import Steck, kl_miss
from genrec.decoding.lists import MaxPerGroup
from genrec.errors import UserError

NUM_ITEMS, NUM_GROUPS = 60, 4
METHODS = {name: runtime.load_object(path) for name, path in RERANKERS.items()}


def make_world(
    seed: int = 0, num_users: int = 7, num_candidates: int = 12, *, padded: bool = True
) -> tuple[Candidates, ItemFacts]:
    """Random lists, items with 0 to 3 groups, and histories of 0 to 9 items."""
    rng = np.random.default_rng(seed)
    rows = np.array([rng.permutation(NUM_ITEMS)[:num_candidates] for _ in range(num_users)])
    scores = -np.sort(rng.exponential(2.0, (num_users, num_candidates)), axis=1)
    if padded:
        for user in range(0, num_users, 3):
            rows[user, num_candidates - user % num_candidates :] = -1
    probabilities = np.where(rows >= 0, np.exp(scores) / 12, 0.0)
    scores = np.where(rows >= 0, scores, -np.inf)
    histories = [rng.integers(0, NUM_ITEMS, rng.integers(0, 10)) for _ in range(num_users)]
    facts = ItemFacts(
        rng.random((NUM_ITEMS, NUM_GROUPS)) < 0.35,
        rng.geometric(0.05, NUM_ITEMS),
        rng.normal(size=(NUM_ITEMS, 5)),
    )
    return Candidates(rows, scores, probabilities, histories), facts


def made(name: str, facts: ItemFacts, **settings: Any) -> Any:
    cls = METHODS[name]
    return cls(cls.Config(**settings), facts)


# -- what holds for all -----------------------------------------------------------------------


@pytest.mark.parametrize("name", RERANKERS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 15))
def test_strength_0_returns_the_first_candidates_to_the_bit(name: str, seed: int, k: int) -> None:
    candidates, facts = make_world(seed)
    tied = np.round(candidates.scores_UM)  # ties must not change places either
    for lists in (candidates, Candidates(candidates.rows_UM, tied, None, candidates.histories)):
        found = made(name, facts, strength=0.0).rerank(lists, k)
        lengths = lists.real_UM.sum(1)
        for places, length in zip(found.places_Uk, lengths, strict=True):
            kept = min(length, k)
            assert places[:kept].tolist() == list(range(kept)) and (places[kept:] == -1).all()
        assert (found.costs_U == 0).all()
        scores = found.take(lists.scores_UM, -np.inf)
        width = min(k, lists.scores_UM.shape[1])
        np.testing.assert_array_equal(scores[:, :width], lists.scores_UM[:, :width])


@pytest.mark.parametrize("name", RERANKERS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 15), strength=st.floats(0, 1))
def test_lists_hold_different_real_candidates_and_cost_what_they_say(
    name: str, seed: int, k: int, strength: float
) -> None:
    candidates, facts = make_world(seed)
    found = made(name, facts, strength=strength).rerank(candidates, k)
    assert found.places_Uk.shape == (len(candidates), k)
    for user, places in enumerate(found.places_Uk):
        real = int(candidates.real_UM[user].sum())
        chosen = places[places >= 0]
        assert len(chosen) == min(k, real) == len(set(chosen.tolist()))
        assert (places[len(chosen) :] == -1).all() and (chosen < real).all()
        scores = candidates.scores_UM[user]
        cost = scores[: len(chosen)].sum() - scores[chosen].sum()
        assert found.costs_U[user] == pytest.approx(cost, abs=1e-9) and found.costs_U[user] >= 0
        lost = candidates.probabilities_UM[user]
        assert found.hits_lost_U[user] == pytest.approx(
            lost[: len(chosen)].sum() - lost[chosen].sum(), abs=1e-9
        )


@pytest.mark.parametrize("name", [name for name in RERANKERS if name != "exposure"])
def test_a_user_alone_gets_the_same_list_as_in_a_batch(name: str) -> None:
    candidates, facts = make_world(5)
    together = made(name, facts, strength=0.6).rerank(candidates, 6).places_Uk
    for user in range(len(candidates)):
        alone = made(name, facts, strength=0.6).rerank(candidates.select(user, user + 1), 6)
        assert alone.places_Uk[0].tolist() == together[user].tolist()


@pytest.mark.parametrize("name", RERANKERS)
def test_small_chunks_give_the_same_lists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, facts = make_world(9, num_users=25)
    whole = made(name, facts, strength=0.6).rerank(candidates, 6)
    monkeypatch.setattr("genrec.calibration.lists.base.CELLS", 1)
    parts = made(name, facts, strength=0.6).rerank(candidates, 6)
    np.testing.assert_array_equal(whole.places_Uk, parts.places_Uk)
    np.testing.assert_array_equal(whole.costs_U, parts.costs_U)


@pytest.mark.parametrize("name", RERANKERS)
def test_no_users_and_users_without_candidates(name: str) -> None:
    candidates, facts = make_world(1)
    if name != "exposure":
        assert made(name, facts).rerank(candidates.select(0, 0), 3).places_Uk.shape == (0, 3)
    candidates.rows_UM[2] = -1
    assert (made(name, facts).rerank(candidates, 3).places_Uk[2] == -1).all()


@pytest.mark.parametrize("name", RERANKERS)
def test_missing_facts_are_named(name: str) -> None:
    with pytest.raises(UserError, match=r"got no (groups|popularity)_N, expected it in"):
        METHODS[name]()


def test_bad_candidates_are_refused() -> None:
    candidates, facts = make_world(1, padded=False)
    method = made("mmr", facts)
    rows, scores = candidates.rows_UM, candidates.scores_UM
    for k in (0, -1, 2.5):
        with pytest.raises(UserError, match=r"k: got .* expected an integer >= 1"):
            method.rerank(candidates, k)
    with pytest.raises(UserError, match="best first"):
        method.rerank(Candidates(rows, scores[:, ::-1]), 3)
    with pytest.raises(UserError, match="best first"):
        method.rerank(Candidates(rows, np.full_like(scores, np.nan)), 3)
    with pytest.raises(UserError, match=r"got shapes \(7, 12\), \(7, 11\)"):
        method.rerank(Candidates(rows, scores[:, :-1]), 3)
    with pytest.raises(UserError, match="padding before items"):
        method.rerank(Candidates(np.where(np.arange(12) == 3, -1, rows), scores), 3)
    with pytest.raises(UserError, match="groups_N has 60 lines"):
        method.rerank(Candidates(rows + 100, scores), 3)
    with pytest.raises(UserError, match="got none for 7 lists"):
        made("steck", facts).rerank(Candidates(rows, scores), 3)
    with pytest.raises(UserError, match="score='probability': got candidates without"):
        made("mmr", facts, score="probability").rerank(Candidates(rows, scores), 3)


# -- slow twins -------------------------------------------------------------------------------


def scaled(scores: np.ndarray) -> np.ndarray:
    span = scores.max() - scores.min()
    return (scores - scores.min()) / span if span > 0 else np.zeros_like(scores)


def slow_greedy(count: int, k: int, value: Any) -> list[int]:
    """Take, again and again, the first best of what is left; `value(i, chosen)`."""
    chosen: list[int] = []
    while len(chosen) < min(k, count):
        left = [i for i in range(count) if i not in chosen]
        chosen.append(max(left, key=lambda i: (value(i, chosen), -i)))
    return chosen


def item_shares(facts: ItemFacts, row: int) -> list[float]:
    groups = [g for g in range(NUM_GROUPS) if facts.groups_N[row, g]]
    shares = [1 / len(groups) if g in groups else 0.0 for g in range(NUM_GROUPS)]
    return [*shares, 0.0 if groups else 1.0]


def wanted_shares(facts: ItemFacts, history: np.ndarray, half_life: float | None) -> list[float]:
    total, shares = 0.0, [0.0] * (NUM_GROUPS + 1)
    for age, row in enumerate(reversed(history.tolist())):
        weight = 1.0 if half_life is None else 0.5 ** (age / half_life)
        total += weight
        for g, share in enumerate(item_shares(facts, row)):
            shares[g] += weight * share
    return [share / total if total else 0.0 for share in shares]


def slow_kl(wanted: list[float], listed: list[float], alpha: float) -> float:
    return sum(
        p * np.log(p / ((1 - alpha) * q + alpha * p))
        for p, q in zip(wanted, listed, strict=True)
        if p
    )


def slow_steck(candidates: Candidates, facts: ItemFacts, user: int, k: int, config: Any) -> list:
    rows = candidates.rows_UM[user][candidates.real_UM[user]].tolist()
    value = scaled(candidates.scores_UM[user][: len(rows)]) if rows else []
    wanted = wanted_shares(facts, candidates.histories[user], config.half_life)

    def worth(i: int, chosen: list[int]) -> float:
        items = [item_shares(facts, rows[j]) for j in [*chosen, i]]
        length = len(items) if config.prefixes else min(k, len(rows))
        listed = [sum(column) / length for column in zip(*items, strict=True)]
        kl = slow_kl(wanted, listed, config.smoothing)
        return (1 - config.strength) * value[i] - config.strength * kl

    return slow_greedy(len(rows), k, worth)


def slow_mmr(candidates: Candidates, facts: ItemFacts, user: int, k: int, config: Any) -> list:
    rows = candidates.rows_UM[user][candidates.real_UM[user]].tolist()
    value = scaled(candidates.scores_UM[user][: len(rows)]) if rows else []

    def similar(a: int, b: int) -> float:
        if config.similarity == "vectors":
            x, y = facts.vectors_NE[a], facts.vectors_NE[b]
            return float(x @ y / np.sqrt((x @ x) * (y @ y)))
        one, other = (set(np.flatnonzero(facts.groups_N[row]).tolist()) for row in (a, b))
        return len(one & other) / len(one | other) if one | other else 0.0

    def worth(i: int, chosen: list[int]) -> float:
        most = max((similar(rows[i], rows[j]) for j in chosen), default=0.0)
        return (1 - config.strength) * value[i] - config.strength * most

    return slow_greedy(len(rows), k, worth)


def slow_xquad(candidates: Candidates, facts: ItemFacts, user: int, k: int, config: Any) -> list:
    rows = candidates.rows_UM[user][candidates.real_UM[user]].tolist()
    value = scaled(candidates.scores_UM[user][: len(rows)]) if rows else []
    wanted = wanted_shares(facts, candidates.histories[user], None)

    def worth(i: int, chosen: list[int]) -> float:
        gain = 0.0
        for g in range(NUM_GROUPS):
            if facts.groups_N[rows[i], g]:
                room = np.prod([1 - value[j] for j in chosen if facts.groups_N[rows[j], g]])
                gain += wanted[g] * value[i] * float(room)
        return (1 - config.strength) * value[i] + config.strength * gain

    return slow_greedy(len(rows), k, worth)


def slow_long_tail(
    candidates: Candidates, facts: ItemFacts, user: int, k: int, config: Any
) -> list:
    rows = candidates.rows_UM[user][candidates.real_UM[user]].tolist()
    value = scaled(candidates.scores_UM[user][: len(rows)]) if rows else []
    least = sorted(facts.popularity_N, reverse=True)[round(config.head_share * NUM_ITEMS) - 1]
    in_tail = [bool(count < least) for count in facts.popularity_N]
    history = [in_tail[row] for row in candidates.histories[user]]
    share = sum(history) / len(history) if history else 0.0
    wanted = {True: share, False: 1 - share if history else 0.0}

    def worth(i: int, chosen: list[int]) -> float:
        kind = in_tail[rows[i]]
        same = sum(in_tail[rows[j]] == kind for j in chosen)
        taken = (same / len(chosen) if chosen else 0.0) if config.smooth else min(same, 1)
        return (1 - config.strength) * value[i] + config.strength * wanted[kind] * (1 - taken)

    return slow_greedy(len(rows), k, worth)


TWINS = [
    ("steck", slow_steck, {}),
    ("steck", slow_steck, {"prefixes": True}),
    ("steck", slow_steck, {"half_life": 3.0, "smoothing": 0.1}),
    ("mmr", slow_mmr, {}),
    ("mmr", slow_mmr, {"similarity": "vectors"}),
    ("xquad", slow_xquad, {}),
    ("long_tail", slow_long_tail, {}),
    ("long_tail", slow_long_tail, {"smooth": False}),
]


@pytest.mark.parametrize(("name", "twin", "options"), TWINS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 0.95])
def test_lists_equal_a_plain_loop(name: str, twin: Any, options: dict, strength: float) -> None:
    for seed in range(4):
        candidates, facts = make_world(seed)
        method = made(name, facts, strength=strength, **options)
        found = method.rerank(candidates, 6).places_Uk
        for user, places in enumerate(found):
            expected = twin(candidates, facts, user, 6, method.config)
            assert places[places >= 0].tolist() == expected, (seed, user)


def test_the_popularity_penalty_is_the_exact_best_of_its_objective() -> None:
    candidates, facts = make_world(3, padded=False)
    found = made("popularity", facts, strength=0.8).rerank(candidates, 4).places_Uk
    worth = candidates.scores_UM - 0.8 * np.log(facts.popularity_N[candidates.rows_UM] + 1.0)
    for user, places in enumerate(found):
        best = max(itertools.combinations(range(12), 4), key=lambda p: worth[user, list(p)].sum())
        assert sorted(places) == sorted(best)
        assert (np.diff(worth[user, places]) <= 0).all()


def test_steck_keeps_its_guarantee_against_every_list() -> None:
    """Greedy gains at least 1 - 1/e of what the best of all lists gains over the empty one."""
    reached = []
    for seed, strength in itertools.product(range(6), (0.2, 0.5, 0.9, 1.0)):
        candidates, facts = make_world(seed, num_candidates=8, padded=False)
        found = made("steck", facts, strength=strength).rerank(candidates, 4).places_Uk
        value_UM = relevance(candidates, "scaled")
        wanted_UG = facts.history_shares(candidates.histories)

        def total(user: int, chosen: Any, world: Any) -> float:
            strength, facts, candidates, value_UM, wanted_UG = world
            rows = candidates.rows_UM[user, list(chosen)]
            kl = float(kl_miss(wanted_UG[user], facts.shares_NG[rows].sum(axis=0) / 4))
            return (1 - strength) * value_UM[user, list(chosen)].sum() - strength * kl

        world = (strength, facts, candidates, value_UM, wanted_UG)
        for user, places in enumerate(found):
            empty = total(user, [], world)
            lists = itertools.combinations(range(8), 4)
            best = max(total(user, chosen, world) for chosen in lists) - empty
            if best > 1e-9:
                reached.append((total(user, places, world) - empty) / best)
    assert 1 - 1 / np.e <= min(reached) and max(reached) <= 1 + 1e-9


def test_kl_miss_by_hand() -> None:
    wanted, listed = np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0])
    mixed = [0.99 + 0.005, 0.005]
    by_hand = 0.5 * np.log(0.5 / mixed[0]) + 0.5 * np.log(0.5 / mixed[1])
    assert kl_miss(wanted, listed) == pytest.approx(by_hand)
    assert kl_miss(wanted, wanted) == pytest.approx(0.0, abs=1e-12)
    assert kl_miss(np.zeros(3), listed) == 0.0


# -- sweeps on planted data -------------------------------------------------------------------


def planted(num_users: int = 60) -> tuple[Candidates, ItemFacts]:
    """Users who like two groups 70/30 but get lists of the first group and popular items first.

    Group 0 is popular; candidates come group by group, so only re-ranking reaches the second.
    """
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(4), 15)
    popularity = np.where(groups == 0, 100, np.where(groups == 1, 20, 5)) + rng.integers(0, 3, 60)
    rows, histories = [], []
    for user in range(num_users):
        other = 1 + user % 3
        front, back = np.flatnonzero(groups == 0), np.flatnonzero(groups == other)
        rows.append(np.concatenate([rng.permutation(front), rng.permutation(back)]))
        histories.append(np.concatenate([rng.choice(front, 7), rng.choice(back, 3)]))
    scores = -np.sort(rng.exponential(1.0, (num_users, 30)), axis=1)
    vectors = np.eye(4)[groups] + 0.1 * rng.normal(size=(60, 4))
    facts = ItemFacts(groups, popularity, vectors)
    return Candidates(np.array(rows), scores, np.exp(scores) / 30, histories), facts


def miss(found: Any, candidates: Candidates, facts: ItemFacts) -> float:
    rows = found.take(candidates.rows_UM, -1)
    listed = np.array([facts.shares_NG[row].mean(axis=0) for row in rows])
    return float(kl_miss(facts.history_shares(candidates.histories), listed).mean())


def mean_log_popularity(found: Any, candidates: Candidates, facts: ItemFacts) -> float:
    return float(np.log(facts.popularity_N[found.take(candidates.rows_UM, -1)] + 1.0).mean())


def tail_miss(found: Any, candidates: Candidates, facts: ItemFacts) -> float:
    kinds = ItemFacts(popularity_groups(facts.popularity_N, (0.2,)))
    listed = kinds.groups_N[found.take(candidates.rows_UM, -1)].mean(axis=1)
    return float(np.abs(kinds.history_shares(candidates.histories)[:, 1] - listed).mean())


def uncovered(found: Any, candidates: Candidates, facts: ItemFacts) -> float:
    groups = facts.groups_N[found.take(candidates.rows_UM, -1)]
    return float(np.mean([4 - len(set(row.tolist())) for row in groups]))


def exposure_miss(found: Any, candidates: Candidates, facts: ItemFacts) -> float:
    method = made("exposure", facts)
    shares = method.exposure(candidates, found.places_Uk)
    return float(np.abs(shares - method._wanted_G).max())


SWEEPS = {
    "steck": miss,
    "popularity": mean_log_popularity,
    "long_tail": tail_miss,
    "mmr": uncovered,
    "xquad": uncovered,
    "exposure": exposure_miss,
}


@pytest.mark.parametrize("name", RERANKERS)
def test_more_strength_never_misses_the_target_more_and_ends_nearer(name: str) -> None:
    candidates, facts = planted()
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
    found = [made(name, facts, strength=s).rerank(candidates, 10) for s in strengths]
    targets = [SWEEPS[name](f, candidates, facts) for f in found]
    costs = [float(f.costs_U.mean()) for f in found]
    assert all(b <= a + 2e-3 for a, b in itertools.pairwise(targets)), targets
    assert targets[-1] < 0.7 * targets[0] and costs[0] == 0 < costs[-1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), low=st.floats(0, 1), high=st.floats(0, 1))
def test_the_popularity_penalty_never_raises_popularity(seed: int, low: float, high: float) -> None:
    candidates, facts = make_world(seed, padded=False)
    low, high = sorted((low, high))
    means = []
    for strength in (low, high):
        found = made("popularity", facts, strength=strength).rerank(candidates, 5)
        rows = found.take(candidates.rows_UM, -1)
        means.append(np.log(facts.popularity_N[rows] + 1.0).mean(axis=1))
    assert (means[1] <= means[0] + 1e-12).all()


def test_steck_at_full_strength_reaches_planted_shares() -> None:
    candidates, facts = planted()
    found = made("steck", facts, strength=0.95).rerank(candidates, 10)
    groups = facts.groups_N[found.take(candidates.rows_UM, -1)]
    assert ((groups == 0).sum(axis=1) == 7).all()


def test_a_user_without_history_keeps_the_list() -> None:
    candidates, facts = planted(4)
    empty = Candidates(candidates.rows_UM, candidates.scores_UM, None, [np.empty(0, np.int64)] * 4)
    for name in ("steck", "xquad", "long_tail"):
        found = made(name, facts, strength=0.9).rerank(empty, 5)
        assert (found.places_Uk == np.arange(5)).all()


# -- exposure ---------------------------------------------------------------------------------


def test_exposure_reaches_its_target_and_says_how_near() -> None:
    candidates, facts = planted(300)
    shares = (0.4, 0.2, 0.2, 0.2)
    method = made("exposure", facts, strength=1.0, shares=shares).fit(candidates, 10)
    reached = method.exposure(candidates, method.rerank(candidates, 10).places_Uk)
    assert np.abs(reached - [*shares, 0.0]).max() == pytest.approx(method.gap, abs=1e-12)
    assert method.gap < 5e-3


def test_exposure_lists_are_the_best_with_their_exposure() -> None:
    """No choice of lists with the same exposure has a larger discounted sum of scores."""
    rng = np.random.default_rng(2)
    rows = np.array([rng.permutation(6)[:4] for _ in range(3)])
    scores = -np.sort(rng.exponential(1.0, (3, 4)), axis=1)
    candidates, facts = Candidates(rows, scores), ItemFacts(np.array([0, 0, 0, 0, 1, 1]))
    method = made("exposure", facts, strength=1.0, target="equal").fit(candidates, 2)
    found = method.rerank(candidates, 2).places_Uk
    discount = 1 / np.log2(np.arange(2) + 2)

    def value(places: np.ndarray) -> float:
        return float((np.take_along_axis(scores, places, axis=1) * discount).sum())

    reached, all_lists = method.exposure(candidates, found), itertools.permutations(range(4), 2)
    lists = [np.array(choice) for choice in itertools.product(list(all_lists), repeat=3)]
    same = [p for p in lists if np.allclose(method.exposure(candidates, p), reached, atol=1e-9)]
    assert len(same) >= 1
    assert value(found) == pytest.approx(max(map(value, same)))
    assert not np.array_equal(found, np.broadcast_to(np.arange(2), (3, 2)))


def test_fitted_bonuses_do_not_depend_on_who_is_asked_or_in_which_order() -> None:
    candidates, facts = planted(80)
    method = made("exposure", facts, strength=1.0, target="equal").fit(candidates, 10)
    together = method.rerank(candidates, 10).places_Uk
    assert (method.rerank(candidates.select(5, 6), 10).places_Uk[0] == together[5]).all()
    order = np.random.default_rng(0).permutation(80)
    shuffled = Candidates(candidates.rows_UM[order], candidates.scores_UM[order])
    again = made("exposure", facts, strength=1.0, target="equal").fit(shuffled, 10)
    np.testing.assert_allclose(again.bonuses_G, method.bonuses_G, rtol=1e-6)


def test_exposure_targets_are_checked() -> None:
    _, facts = planted(3)
    with pytest.raises(UserError, match=r"expected 4 numbers >= 0 that add up to 1"):
        made("exposure", facts, shares=(0.5, 0.6))
    with pytest.raises(UserError, match="got no popularity_N"):
        made("exposure", ItemFacts(facts.groups_N), target="popularity")
    none = Candidates(np.full((2, 3), -1), np.full((2, 3), -np.inf))
    with pytest.raises(UserError, match="got no items to fit on"):
        made("exposure", facts).fit(none, 2)


def test_popularity_groups_keep_equal_counts_together() -> None:
    counts = np.array([9, 9, 9, 5, 5, 4, 3, 2, 1, 0])
    assert popularity_groups(counts, (0.2,)).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert popularity_groups(counts, (0.3, 0.5)).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    for shares in ((0.5, 0.2), (0.0,), (1.0,)):
        with pytest.raises(UserError, match="expected rising numbers between 0 and 1"):
            popularity_groups(counts, shares)
    with pytest.raises(UserError, match="got no items"):
        popularity_groups(np.empty(0))


def test_methods_are_the_classes_of_the_registry() -> None:
    found = {cls.Config().name: cls for cls in (Steck, PopularityPenalty, LongTail, MMR, XQuAD)}
    found["exposure"] = Exposure
    assert found == METHODS


# -- in the Recommender -----------------------------------------------------------------------

HISTORIES = [["50", "51", "52"], ["7"], ["100", "101", "102", "103"]]


def test_the_recommender_reranks(small_run: Path) -> None:
    recommender = Recommender.from_pretrained(small_run / "bundle", device="cpu")
    facts = ItemFacts(np.arange(184) % 5)
    plain = recommender.recommend(HISTORIES, 5)
    same = recommender.recommend(HISTORIES, 5, rerank=made("steck", facts, strength=0.0))
    for name in ("item_ids", "scores", "probabilities", "certified"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(same, name))
    assert (same.rule_costs == 0).all() and plain.rule_costs is None
    method = made("mmr", facts, strength=0.9)
    varied = recommender.recommend(HISTORIES, 5, rerank=method, width=60)
    for items in varied.item_ids:
        assert len({int(item) % 5 for item in items}) == 5
    assert (varied.rule_costs > 0).any()
    wide = recommender.recommend(HISTORIES, 60, width=60)
    for user in range(3):
        own = dict(zip(wide.item_ids[user], wide.probabilities[user], strict=True))
        np.testing.assert_array_equal(
            [own[item] for item in varied.item_ids[user]], varied.probabilities[user]
        )
    with pytest.raises(UserError, match="got list_rules and rerank, expected one"):
        rules = [MaxPerGroup(np.arange(184) % 5, 2)]
        recommender.recommend(HISTORIES, 5, rerank=made("mmr", facts), list_rules=rules)
