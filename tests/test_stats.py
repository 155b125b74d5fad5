"""eval.stats: intervals that cover, tests that do not cry wolf, clusters that count as one."""

from __future__ import annotations

import numpy as np
import pytest

from eval.stats import (
    cluster_sums,
    holm,
    macro,
    mean,
    paired_difference,
    paired_macro,
    ratio,
    texts_needed,
)


def test_ratio_is_errors_over_words_not_a_mean_of_rates():
    estimate = ratio([1, 0, 9], [10, 10, 10], ["a", "b", "c"])
    assert estimate.value == pytest.approx(10 / 30)
    assert ratio([5, 0], [5, 95], ["a", "b"]).value == pytest.approx(0.05)
    assert estimate.low <= estimate.value <= estimate.high and estimate.texts == 3


def test_same_seed_same_interval_other_seed_other_interval():
    rng = np.random.default_rng(0)
    errors, words = rng.integers(0, 5, 40), rng.integers(5, 15, 40)
    one, two, other = (ratio(errors, words, range(40), seed=s) for s in (1, 1, 2))
    assert one == two and one != other


def test_clips_of_one_text_are_drawn_together():
    """Ten copies of each text bring no information: the interval must not shrink."""
    rng = np.random.default_rng(0)
    errors, words = rng.integers(0, 4, 30), np.full(30, 10)
    single = ratio(errors, words, range(30))
    texts = [i for i in range(30) for _ in range(10)]
    copied = ratio(np.repeat(errors, 10), np.repeat(words, 10), texts)
    assert copied.texts == 30
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    naive = ratio(np.repeat(errors, 10), np.repeat(words, 10), range(300))
    assert naive.high - naive.low < 0.6 * (single.high - single.low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(120):
        errors = rng.binomial(10, 0.2, size=80)
        estimate = ratio(errors, [10] * 80, range(80), seed=trial, draws=400)
        covered += estimate.low <= 0.2 <= estimate.high
    assert 0.87 <= covered / 120 <= 1.0


def test_bootstrap_agrees_with_the_textbook_standard_error():
    values = np.random.default_rng(2).normal(size=400)
    estimate = mean(values, range(400))
    expected = 2 * 1.96 * values.std() / 20
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)


def test_empty_sets_and_no_words_raise():
    with pytest.raises(ValueError, match="the set is empty"):
        ratio([], [], [])
    with pytest.raises(ValueError, match="add up to zero"):
        ratio([0], [0], ["a"])
    with pytest.raises(ValueError, match="no languages"):
        macro({})


def test_one_text_has_no_interval():
    estimate = ratio([1, 2], [10, 10], ["a", "a"])
    assert estimate.value == pytest.approx(0.15) and estimate.low is None


def test_macro_weighs_languages_equally_and_draws_them_apart():
    big = ([10] * 100, [100] * 100, list(range(100)))
    small = ([5, 5], [10, 10], [0, 1])
    assert macro({"a": big, "b": small}).value == pytest.approx((0.1 + 0.5) / 2)
    rng = np.random.default_rng(0)
    noisy = (rng.integers(0, 5, 50), [10] * 50, list(range(50)))
    both = macro({"a": noisy, "b": noisy})
    one = ratio(*noisy, label="a")
    # Independent streams: the mean of two is narrower by about the root of two.
    assert both.high - both.low < 0.85 * (one.high - one.low)


def test_paired_difference_sees_a_small_steady_gain_that_unpaired_intervals_hide():
    rng = np.random.default_rng(3)
    hard = rng.integers(0, 9, 100)  # texts differ far more than the systems do
    a = np.stack([hard + 1, np.full(100, 10)], axis=1).astype(float)
    b = a.copy()
    b[:30, 0] -= 1
    b[30:35, 0] += 1
    result = paired_difference(a, b)
    assert result.value == pytest.approx(-0.025)
    assert result.high < 0 and result.p < 0.01
    alone = ratio(b[:, 0], b[:, 1], range(100))
    assert alone.high > a[:, 0].sum() / a[:, 1].sum()


def test_equal_runs_show_no_difference():
    a = np.array([[1.0, 10.0], [3.0, 10.0], [0.0, 5.0]])
    result = paired_difference(a, a.copy())
    assert (result.value, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_p_values_are_uniform_enough_when_nothing_differs():
    rng = np.random.default_rng(4)
    p = []
    for trial in range(100):
        words = np.full(40, 10.0)
        a, b = (np.stack([rng.binomial(10, 0.2, 40), words], 1).astype(float) for _ in range(2))
        p.append(paired_difference(a, b, seed=trial, draws=300).p)
    assert np.mean(np.array(p) < 0.05) <= 0.12 and 0.35 < np.mean(p) < 0.65


def test_a_plain_difference_survives_the_correction_for_all_languages():
    words = np.full(60, 10.0)
    a, b = (np.stack([np.full(60, e), words], 1) for e in (0.0, 3.0))
    p = {f"l{i}": 0.5 for i in range(112)} | {"worse": paired_difference(a, b).p}
    assert holm(p)["worse"] < 0.01


def test_different_texts_are_refused():
    with pytest.raises(ValueError, match="different texts"):
        paired_difference(np.zeros((2, 2)), np.zeros((3, 2)))


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_sample_size_goes_with_the_square():
    assert texts_needed(0.02, 100, 0.01) == 400
    with pytest.raises(ValueError, match="positive"):
        texts_needed(0.02, 100, 0)


def test_cluster_sums_keep_first_order():
    sums, names = cluster_sums([[1, 2], [3, 4], [5, 6]], ["b", "a", "b"])
    assert names == ["b", "a"] and sums.tolist() == [[6, 8], [3, 4]]


def test_many_clusters_are_drawn_in_bounded_chunks():
    count = 30_000
    estimate = ratio([1] * count, [10] * count, range(count), draws=300)
    assert estimate.low == estimate.high == pytest.approx(0.1)


def cover(rate: float, texts: int, words: int, takes: int = 1, trials: int = 150) -> float:
    """How often the interval holds the true rate; texts differ in difficulty (beta-binomial)."""
    rng = np.random.default_rng(7)
    a, b = 9 * rate, 9 * (1 - rate)  # intraclass correlation 0.1
    inside = 0
    for trial in range(trials):
        difficulty = np.repeat(rng.beta(a, b, size=texts), takes)
        errors = rng.binomial(words, difficulty)
        clusters = np.repeat(np.arange(texts), takes)
        found = ratio(errors, [words] * len(errors), clusters, seed=trial, draws=600)
        inside += found.low <= rate <= found.high
    return inside / trials


@pytest.mark.parametrize(
    ("rate", "texts", "takes"), [(0.01, 30, 1), (0.03, 100, 1), (0.1, 100, 3), (0.4, 30, 1)]
)
def test_intervals_cover_where_errors_are_rare_or_clips_share_texts(rate, texts, takes):
    """Plain percentiles hold the truth in 86 % of the first case."""
    assert 0.9 <= cover(rate, texts, 8, takes) <= 1.0


def test_no_error_seen_is_not_proof_of_none():
    none = ratio([0] * 24, [5] * 24, range(24))
    assert none.value == none.low == 0 and none.high == pytest.approx(0.0285, abs=1e-3)
    assert ratio([0] * 240, [5] * 240, range(240)).high == pytest.approx(none.high / 9.4, rel=0.1)
    one = ratio([1] + [0] * 23, [5] * 24, range(24))
    assert one.high > 0.6 * none.high  # no jump from none to one
    both = macro({c: ([0] * 24, [5] * 24, list(range(24))) for c in "ab"})
    assert 0.4 * none.high < both.high < 0.6 * none.high


def test_mean_difference_over_languages_weighs_them_equally_and_sees_what_each_alone_hides():
    rng = np.random.default_rng(5)
    groups = {}
    for code in "abcdefgh":
        words = np.full(40, 10.0)
        one, two = rng.binomial(10, 0.20, 40), rng.binomial(10, 0.17, 40)
        groups[code] = tuple(np.stack([e, words], 1).astype(float) for e in (one, two))
    alone = {code: paired_difference(*pair, label=code) for code, pair in groups.items()}
    result = paired_macro(groups)
    assert result.value == pytest.approx(np.mean([d.value for d in alone.values()]))
    assert result.high < 0 and result.p < 0.01 and result.texts == 320
    assert sum(d.p < 0.05 / 8 for d in alone.values()) <= 2
    with pytest.raises(ValueError, match="no languages"):
        paired_macro({})
