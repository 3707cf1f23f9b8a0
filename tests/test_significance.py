"""Bootstrap intervals: coverage on known distributions, seeds, pairing, degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_rel

from genrec.errors import UserError
from genrec.evaluation.significance import (
    detectable_difference,
    detectable_prior,
    holm,
    mean_ci,
    paired_bootstrap,
    paired_permutation,
    paired_test,
    per_user,
)


def hits(share: float, users: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(users) < share).astype(float)


@pytest.mark.parametrize("kind", ["few distinct values", "many distinct values"])
def test_interval_width_equals_the_normal_one_on_a_large_sample(kind):
    rng = np.random.default_rng(3)
    values = hits(0.2, 4000, 3) if kind.startswith("few") else rng.normal(size=4000)
    found = mean_ci(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        found = mean_ci(hits(0.3, 150, seed), seed=seed, num_samples=400)
        covered += found.low <= 0.3 <= found.high
    assert 178 <= covered <= 200  # 95% of 200, five standard deviations


def test_same_seed_same_interval_and_constant_values_have_none():
    values = hits(0.3, 100, 0)
    assert mean_ci(values, seed=5) == mean_ci(values, seed=5)
    assert mean_ci(values, seed=5) != mean_ci(values, seed=6)
    assert tuple(mean_ci(np.full(10, 0.25))) == (0.25, 0.25, 0.25)


def test_level_widens_the_interval():
    values = hits(0.3, 300, 0)
    narrow, wide = mean_ci(values, level=0.5), mean_ci(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_seeds_are_averaged_per_user_first():
    seeds = np.stack([hits(0.3, 500, s) for s in range(3)])
    assert mean_ci(seeds, seed=2) == mean_ci(seeds.mean(axis=0), seed=2)
    assert per_user(seeds).shape == (500,)


def test_pairing_finds_a_difference_that_unpaired_intervals_hide():
    base = np.random.default_rng(0).random(400)
    better = base + 0.01
    assert mean_ci(better).low < mean_ci(base).high
    found = paired_bootstrap(better, base)
    assert found["difference"] == pytest.approx(0.01)
    assert found["ci"] == pytest.approx([0.01, 0.01])
    assert found["p"] == pytest.approx(2 / 2001)


def test_no_difference_is_not_significant_even_with_rounding_errors():
    found = paired_bootstrap(np.full(50, 0.1 + 0.2), np.full(50, 0.3))
    assert found["difference"] == 0 and found["ci"] == [0, 0] and found["p"] == 1


def test_p_is_about_uniform_when_nothing_differs():
    p = [
        paired_bootstrap(hits(0.2, 300, s), hits(0.2, 300, 1000 + s), seed=s, num_samples=300)["p"]
        for s in range(200)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.12
    assert 0.35 < np.mean(p) < 0.65


def test_swapping_the_systems_flips_the_sign():
    a, b = hits(0.4, 300, 1), hits(0.3, 300, 2)
    assert paired_bootstrap(a, b)["difference"] == -paired_bootstrap(b, a)["difference"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_ci(np.array([])), "at least one user"),
        (lambda: mean_ci(np.ones((2, 3, 4))), "expected \\(users,\\)"),
        (lambda: mean_ci(np.array([1.0, np.nan])), "NaN"),
        (lambda: mean_ci(np.ones(3), level=95), "e.g. 0.95"),
        (lambda: mean_ci(np.ones(3), num_samples=0), "num_samples: got 0"),
        (lambda: paired_bootstrap(np.ones(3), np.ones(4)), "the same users"),
        (lambda: paired_permutation(np.ones(3), np.ones(4)), "the same users"),
        (lambda: paired_permutation(np.ones(3), np.zeros(3), num_samples=0), "num_samples: got 0"),
        (lambda: detectable_prior(np.ones(3), correlation=2), "from -1 to 1"),
        (lambda: detectable_difference(np.ones(3), np.zeros(3), power=1), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_holm_by_hand():
    # 4 tests: .01 x 4, .02 x 3, then never below what came before: .03 x 2 = .06, .04 -> .06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_few_users_get_the_exact_sign_flip_p():
    a, b = np.array([0.9, 0.4, 0.7, 0.2, 0.5, 0.6]), np.array([0.5, 0.5, 0.1, 0.2, 0.4, 0.1])
    exact = permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples",
        n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    assert paired_permutation(a, b) == pytest.approx(exact.pvalue)
    # All five of one sign: the two extreme assignments of 2^5.
    assert paired_permutation(np.ones(5), np.zeros(5)) == 2 / 2**5


@pytest.mark.parametrize("kind", ["few distinct values", "many distinct values"])
def test_sign_flip_p_agrees_with_the_t_test_on_many_users(kind):
    rng = np.random.default_rng(4)
    if kind.startswith("few"):
        a, b = hits(0.25, 3000, 1), hits(0.23, 3000, 2)
    else:
        a, b = rng.normal(0.03, 1, 3000), rng.normal(0, 1, 3000)
    found = paired_permutation(a, b, num_samples=10_000)
    assert found == pytest.approx(ttest_rel(a, b).pvalue, abs=0.02)


def test_sign_flip_p_is_uniform_when_nothing_differs_and_never_zero():
    p = [paired_permutation(hits(0.3, 200, s), hits(0.3, 200, 500 + s), s, 400) for s in range(200)]
    assert np.mean(np.array(p) <= 0.05) < 0.11 and 0.4 < np.mean(p) < 0.65
    assert paired_permutation(np.ones(100), np.zeros(100), num_samples=99) == 1 / 100
    assert paired_permutation(np.ones(9), np.ones(9)) == 1.0
    assert paired_permutation(np.full(50, 0.1 + 0.2), np.full(50, 0.3)) == 1.0


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    users, found = 150, 0
    for _ in range(300):
        noise = rng.normal(size=users)
        size = 2.8016 / np.sqrt(users)  # (z(.975) + z(.8)) sd / sqrt(U), sd = 1
        found += ttest_rel(noise + size, np.zeros(users)).pvalue < 0.05
    assert 0.73 < found / 300 < 0.87
    noise = rng.normal(size=100_000)
    measured = detectable_difference(noise, np.zeros(100_000))
    assert measured == pytest.approx(2.8016 / np.sqrt(100_000), rel=0.02)


def test_detectable_before_there_is_a_pair_takes_independent_systems():
    a, b = hits(0.2, 20_000, 1), hits(0.2, 20_000, 2)
    assert detectable_prior(a) == pytest.approx(detectable_difference(a, b), rel=0.03)
    assert detectable_prior(a, correlation=0.75) == pytest.approx(detectable_prior(a) / 2)
    assert detectable_difference(a, a) == 0


def test_everything_that_is_said_about_a_difference():
    a, b = np.stack([hits(0.4, 300, 1), hits(0.4, 300, 3)]), hits(0.3, 300, 2)
    found = paired_test(a, b, num_samples=500)
    assert {key: found[key] for key in ("difference", "ci", "p")} == paired_bootstrap(
        a, b, num_samples=500
    )
    assert found["p_permutation"] == paired_permutation(a, b, num_samples=500)
    assert found["detectable"] == detectable_difference(a, b)
