"""Statistics against scipy, literals and synthetic coverage."""

import numpy as np
import pytest
from scipy import stats

from offmeta.results import statistics

NAN = np.nan


def test_final_return_is_the_last_episode_that_exists():
  returns = [[1.0, 2.0, 3.0], [4.0, 5.0, NAN], [6.0, NAN, NAN]]
  np.testing.assert_array_equal(
    statistics.final_returns(returns), [3.0, 5.0, 6.0]
  )


def test_final_return_skips_a_hole():
  assert statistics.final_returns([1.0, NAN, 3.0, NAN]) == 3.0


def test_first_return_is_the_first_episode_that_exists():
  returns = [[1.0, 2.0, 3.0], [NAN, 5.0, NAN], [NAN, NAN, 6.0]]
  np.testing.assert_array_equal(
    statistics.first_returns(returns), [1.0, 5.0, 6.0]
  )


@pytest.mark.parametrize(
  'function', [statistics.final_returns, statistics.first_returns]
)
@pytest.mark.parametrize('returns', [[NAN, NAN], [1.0, np.inf], []])
def test_returns_need_finite_episodes(returns, function):
  with pytest.raises(ValueError, match='finite'):
    function(returns)


def test_seed_scores_average_tasks_and_repetitions():
  # Seed 0: finals 1, 3 and 5, 7 -> 4. Seed 1: finals 10, 10 and 0, 20 -> 10.
  returns = np.array(
    [
      [[[0, 1], [9, 3]], [[9, 5], [9, 7]]],
      [[[0, 10], [10, NAN]], [[9, 0], [9, 20]]],
    ]
  )
  np.testing.assert_allclose(statistics.seed_scores(returns), [4.0, 10.0])
  np.testing.assert_allclose(
    statistics.unadapted_scores(returns), [(0 + 9 + 9 + 9) / 4, 28 / 4]
  )
  np.testing.assert_allclose(
    statistics.task_scores(returns), [[2.0, 6.0], [10.0, 10.0]]
  )


def test_nearest_is_chosen_row_by_row():
  values = np.array([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
  steps = np.array([[[10, 90, 210]], [[60, 140, 160]]])
  np.testing.assert_array_equal(
    statistics.nearest(values, steps, 100), [[2.0], [4.0]]
  )


def test_t_interval_of_a_textbook_case():
  # Mean 3, standard deviation sqrt(2.5), error sqrt(0.5), t(0.975, 4) =
  # 2.776445: 3 -+ 1.963243.
  interval = statistics.t_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
  np.testing.assert_allclose(interval[:3], [3.0, 1.036757, 4.963243], atol=1e-6)
  assert interval.seeds == 5 and interval.reason is None


def test_t_interval_equals_scipy():
  scores = np.random.default_rng(3).normal(size=7)
  expected = stats.ttest_1samp(scores, 0.0).confidence_interval(0.9)
  interval = statistics.t_interval(scores, confidence=0.9)
  np.testing.assert_allclose((interval.low, interval.high), expected)


def test_one_seed_has_no_interval():
  interval = statistics.t_interval(np.array([2.5]))
  assert interval == (2.5, None, None, 1, 'one seed has no spread')


@pytest.mark.parametrize('scores', [[], [[1.0]], [1.0, NAN]])
def test_t_interval_rejects(scores):
  with pytest.raises(ValueError):
    statistics.t_interval(np.array(scores))


def test_paired_difference_equals_scipy():
  rng = np.random.default_rng(1)
  before = rng.normal(size=6)
  after = before + rng.normal(1.0, 0.1, size=6)
  expected = stats.ttest_rel(after, before).confidence_interval()
  interval = statistics.paired_difference(after, before)
  np.testing.assert_allclose((interval.low, interval.high), expected)


def test_paired_difference_needs_pairs():
  with pytest.raises(ValueError, match='paired'):
    statistics.paired_difference(np.ones(3), np.ones(4))


def test_coverage_of_the_t_interval():
  rng = np.random.default_rng(0)
  hits = [
    low <= 1.0 <= high
    for _, low, high, *_ in (
      statistics.t_interval(row) for row in rng.normal(1, 2, size=(2000, 5))
    )
  ]
  assert abs(np.mean(hits) - 0.95) < 0.015  # three standard errors


def test_coverage_of_the_ratio_interval():
  # Correlated numerator and denominator with true ratio 0.6.
  rng = np.random.default_rng(0)
  hits = []
  for _ in range(2000):
    shared = rng.normal(size=5)
    top = 3.0 + shared + 0.5 * rng.normal(size=5)
    bottom = 5.0 + shared
    result = statistics.ratio_of_means(top, bottom)
    # An unbounded set is [-inf, inf] here: it covers.
    hits.append(result.low is None or result.low <= 0.6 <= result.high)
  assert abs(np.mean(hits) - 0.95) < 0.015


def test_ratio_interval_ends_are_where_the_t_test_turns():
  rng = np.random.default_rng(5)
  top, bottom = 4 + rng.normal(size=6), 8 + rng.normal(size=6)
  result = statistics.ratio_of_means(top, bottom)
  assert result.mean == pytest.approx(top.mean() / bottom.mean())
  for end in (result.low, result.high):
    assert stats.ttest_1samp(top - end * bottom, 0.0).pvalue == pytest.approx(
      0.05
    )


def test_gap_closed_without_noise():
  offline = np.array([-15.0, -14.0, -16.0])
  result = statistics.gap_closed(offline, offline + 3.0, offline + 4.0)
  np.testing.assert_allclose(result[:3], [0.75, 0.75, 0.75])


def test_gap_closed_with_one_seed():
  result = statistics.gap_closed(
    np.array([0.0]), np.array([1.0]), np.array([4.0])
  )
  assert result[:4] == (0.25, None, None, 1)


@pytest.mark.parametrize('oracle', [[-5.0, -4.0, -6.0], [-6.0, -5.5, -7.0]])
def test_gap_closed_without_a_gap(oracle):
  offline = np.array([-5.0, -4.0, -6.0])
  result = statistics.gap_closed(offline, offline + 1.0, np.array(oracle))
  assert result[:3] == (None, None, None)
  assert 'oracle' in result.reason


def test_gap_closed_with_a_gap_within_its_noise():
  offline = np.zeros(4)
  oracle = np.array([3.0, -3.0, 3.0, -2.0])  # mean 0.25, error 1.6
  result = statistics.gap_closed(offline, offline + 1.0, oracle)
  assert result[:3] == (None, None, None)
  assert 'near 0' in result.reason
  oracle = np.array([3.0, -0.5, 3.0, -0.5])  # mean 1.25, error 1.01
  result = statistics.gap_closed(offline, offline + 1.0, oracle)
  assert result.mean == pytest.approx(0.8) and result.low is None
  assert 'not distinguishable' in result.reason


@pytest.mark.parametrize('size', [1, 3, 4, 7, 20, 41])
def test_interquartile_mean_equals_scipy(size):
  scores = np.random.default_rng(size).standard_t(2, size=size)
  assert statistics.interquartile_mean(scores) == pytest.approx(
    stats.trim_mean(scores, 0.25)
  )


def test_interquartile_mean_of_literals():
  # Of eight values the two smallest and the two largest are dropped.
  scores = [[100.0, 3.0, 4.0, 1.0], [-50.0, 2.0, 5.0, 6.0]]
  assert statistics.interquartile_mean(scores) == 3.5  # of 2, 3, 4, 5


def test_bootstrap_is_reproducible():
  scores = np.random.default_rng(0).normal(size=(5, 6))
  first = statistics.stratified_bootstrap_interval(scores, seed=1, resamples=99)
  np.random.seed(123)  # global state must not matter
  again = statistics.stratified_bootstrap_interval(scores, seed=1, resamples=99)
  other = statistics.stratified_bootstrap_interval(scores, seed=2, resamples=99)
  assert first == again
  assert first.low != other.low and first.mean == other.mean


def test_bootstrap_is_stratified_by_task():
  # Tasks differ wildly, seeds do not: a stratified resample has no spread.
  scores = np.tile([0.0, 100.0, 1000.0, -50.0], (4, 1))
  interval = statistics.stratified_bootstrap_interval(scores, resamples=50)
  assert interval.low == interval.high == interval.mean == 50.0


def test_coverage_of_the_bootstrap():
  # Independent normal runs on 10 tasks, 10 seeds each; the true value is 0.
  rng = np.random.default_rng(0)
  hits = []
  for trial in range(150):
    interval = statistics.stratified_bootstrap_interval(
      rng.normal(size=(10, 10)), seed=trial, resamples=200
    )
    hits.append(interval.low <= 0.0 <= interval.high)
  assert 0.87 < np.mean(hits) <= 1.0


def test_bootstrap_with_one_seed():
  interval = statistics.stratified_bootstrap_interval(np.ones((1, 4)))
  assert interval[:4] == (1.0, None, None, 1)


def test_probability_of_improvement():
  # Task 0: 3 > 1, 3 > 2, 1 = 1, 1 < 2 -> (2 + 0.5) / 4. Task 1: all above.
  scores = np.array([[3.0, 9.0], [1.0, 8.0]])
  baseline = np.array([[1.0, 0.0], [2.0, 1.0]])
  assert statistics.probability_of_improvement(
    scores, baseline
  ) == pytest.approx((0.625 + 1.0) / 2)
  expected = np.mean(
    [
      stats.mannwhitneyu(scores[:, i], baseline[:, i]).statistic / 4
      for i in range(2)
    ]
  )
  assert statistics.probability_of_improvement(
    scores, baseline
  ) == pytest.approx(expected)


def test_probability_of_improvement_needs_the_same_tasks():
  with pytest.raises(ValueError, match='S'):
    statistics.probability_of_improvement(np.ones((2, 3)), np.ones((2, 4)))


def test_band_equals_scipy_and_skips_missing_seeds():
  values = np.array(
    [[1.0, 2.0, 4.0], [1.0, NAN, 3.0], [5.0, NAN, NAN], [NAN, NAN, NAN]]
  )
  mean, low, high = statistics.band(values)
  np.testing.assert_allclose(mean, [7 / 3, 2.0, 5.0, NAN])
  for row, finite in ((0, [1.0, 2.0, 4.0]), (1, [1.0, 3.0])):
    expected = stats.ttest_1samp(finite, 0.0).confidence_interval()
    np.testing.assert_allclose((low[row], high[row]), expected)
  assert low[2] == high[2] == 5.0
