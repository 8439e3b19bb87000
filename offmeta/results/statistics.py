"""Statistics of returns: numbers in, point estimates and intervals out.

Axis letters: S seeds, M tasks, R repetitions, E episodes. The unit of
replication is the *seed*: tasks and repetitions inside one seed share a
trained policy, so they are averaged first and only seeds count as independent
draws. Every interval here has nominal coverage 95% unless told otherwise.
"""

from typing import NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
  """A point estimate with its interval; None where it cannot be computed.

  Attributes:
    mean: point estimate.
    low, high: ends of the interval, None with fewer than two seeds.
    seeds: how many seeds went in.
    reason: why something is None, else None.
  """

  mean: float | None
  low: float | None
  high: float | None
  seeds: int
  reason: str | None = None

  def as_dict(self) -> dict[str, float | int | str | None]:
    """JSON fields; 'reason' only where there is one."""
    fields = self._asdict()
    if self.reason is None:
      del fields['reason']
    return fields


def final_returns(returns: np.ndarray) -> np.ndarray:
  """Return of the last episode that exists, the meta-test score.

  Args:
    returns: [..., E], NaN where an episode does not exist.

  Returns:
    [...].

  Raises:
    ValueError: a repetition has no finite episode, or a return is infinite.
  """
  exists = _existing(returns)
  last = exists.shape[-1] - 1 - np.argmax(exists[..., ::-1], axis=-1)
  return _episode(returns, last)


def first_returns(returns: np.ndarray) -> np.ndarray:
  """Return of the first episode that exists: nothing is known of the task.

  As `final_returns` in all else.
  """
  return _episode(returns, np.argmax(_existing(returns), axis=-1))


def _existing(returns: np.ndarray) -> np.ndarray:
  """Which episodes exist, [..., E]; see `final_returns` for what it raises."""
  returns = np.asarray(returns, np.float64)
  if np.isinf(returns).any():
    raise ValueError('infinite return')
  exists = np.isfinite(returns)
  if returns.shape[-1] == 0 or not exists.any(-1).all():
    raise ValueError('a repetition has no finite episode')
  return exists


def _episode(returns: np.ndarray, index: np.ndarray) -> np.ndarray:
  """[..., E] at [...]."""
  returns = np.asarray(returns, np.float64)
  return np.take_along_axis(returns, index[..., None], axis=-1)[..., 0]


def task_scores(returns: np.ndarray) -> np.ndarray:
  """Final return averaged over repetitions: [S, M, R, E] -> [S, M]."""
  return final_returns(returns).mean(-1)


def seed_scores(returns: np.ndarray) -> np.ndarray:
  """Final return averaged over tasks and repetitions: [S, M, R, E] -> [S]."""
  return task_scores(returns).mean(-1)


def unadapted_scores(returns: np.ndarray) -> np.ndarray:
  """The same of the first episode: [S, M, R, E] -> [S]."""
  return first_returns(returns).mean((-2, -1))


def nearest(values: np.ndarray, at: np.ndarray, target: float) -> np.ndarray:
  """The value where `at` comes nearest to `target`: [..., K] -> [...].

  Args:
    values: [..., K].
    at: [..., K], increasing along the last axis.
    target: in units of `at`.
  """
  return _episode(values, np.argmin(np.abs(at - target), axis=-1))


def t_interval(scores: np.ndarray, confidence: float = 0.95) -> Interval:
  """Mean over seeds with the Student t interval.

  With the three to ten seeds of this field a percentile bootstrap is too
  narrow: with 5 normal seeds its nominal 95% covers about 83% (measured),
  because resampled means use the plug-in variance, too small by (n-1)/n, and
  have no t tails.
  The t interval is exact for normal scores, and a mean over many tasks and
  repetitions is close to normal.

  Args:
    scores: [S], one number per seed.
    confidence: nominal coverage.

  Returns:
    The interval; without ends for one seed.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 1 or not scores.size:
    raise ValueError(f'scores must be [S] with S > 0, got {scores.shape}')
  if not np.isfinite(scores).all():
    raise ValueError('scores must be finite')
  mean, count = float(scores.mean()), scores.size
  if count == 1:
    return Interval(mean, None, None, 1, 'one seed has no spread')
  half = float(_t_quantile(confidence, count - 1) * _error(scores))
  return Interval(mean, mean - half, mean + half, count)


def paired_difference(
  scores: np.ndarray, baseline: np.ndarray, confidence: float = 0.95
) -> Interval:
  """Mean of `scores - baseline` seed by seed, with its t interval.

  Pairing removes what the two share (same data, same initial weights).

  Args:
    scores: [S].
    baseline: [S], the same seeds in the same order.
    confidence: nominal coverage.
  """
  scores, baseline = _paired(scores, baseline)
  return t_interval(scores - baseline, confidence)


def ratio_of_means(
  numerator: np.ndarray, denominator: np.ndarray, confidence: float = 0.95
) -> Interval:
  """mean(numerator) / mean(denominator) with Fieller's interval.

  The interval is every ratio r for which a paired t test does not reject
  mean(numerator - r * denominator) = 0. It is exact for normal pairs at any
  number of seeds, keeps the pairing through the covariance, and says so
  (by being unbounded) when the denominator cannot be told from 0. A bootstrap
  over five seeds does none of this: it inherits the narrowness described in
  `t_interval`, and resamples whose denominator crosses 0 give it wild ends.

  Args:
    numerator: [S].
    denominator: [S], the same seeds in the same order.
    confidence: nominal coverage.

  Returns:
    mean None where the denominator is within one standard error of 0; low
    and high None where Fieller's set is unbounded or there is one seed.
  """
  numerator, denominator = _paired(numerator, denominator)
  count = numerator.size
  top, bottom = float(numerator.mean()), float(denominator.mean())
  error = _error(denominator) if count > 1 else 0.0
  scale = max(np.abs(numerator).max(), np.abs(denominator).max())
  if abs(bottom) <= max(error, 1e-9 * scale):
    return Interval(None, None, None, count, 'the denominator is near 0')
  ratio = top / bottom
  if count == 1:
    return Interval(ratio, None, None, 1, 'one seed has no spread')
  cov = np.cov(numerator, denominator) / count
  quantile = _t_quantile(confidence, count - 1) ** 2
  a = bottom**2 - quantile * cov[1, 1]
  b = top * bottom - quantile * cov[0, 1]
  c = top**2 - quantile * cov[0, 0]
  if a <= 0:
    return Interval(
      ratio,
      None,
      None,
      count,
      f'the denominator is not distinguishable from 0 at {confidence:.0%}',
    )
  root = np.sqrt(max(b**2 - a * c, 0.0))
  return Interval(ratio, float((b - root) / a), float((b + root) / a), count)


def gap_closed(
  offline: np.ndarray,
  online: np.ndarray,
  oracle: np.ndarray,
  confidence: float = 0.95,
) -> Interval:
  """Share of the gap between offline and oracle that `online` closes.

  (online - offline) / (oracle - offline), the ratio of means over seeds with
  Fieller's interval (`ratio_of_means` says why). 0 is no gain, 1 is as good
  as the oracle, above 1 is better.

  Args:
    offline, online, oracle: [S], the same seeds in the same order.
    confidence: nominal coverage.

  Returns:
    The interval; None with a reason where there is no gap to close.
  """
  online, offline = _paired(online, offline)
  oracle, offline = _paired(oracle, offline)
  gap = oracle - offline
  if gap.mean() <= 0:
    return Interval(
      None,
      None,
      None,
      gap.size,
      'no gap: the oracle is not better than the offline phase',
    )
  result = ratio_of_means(online - offline, gap, confidence)
  if result.reason is None or result.seeds == 1:
    return result
  return result._replace(
    reason=result.reason.replace(
      'the denominator', 'the gap between oracle and offline'
    )
  )


def interquartile_mean(scores: np.ndarray) -> float:
  """Mean of the middle half of all scores, whatever their shape.

  As scipy.stats.trim_mean(scores, 0.25): floor(n / 4) values are dropped at
  each end.
  """
  ordered = np.sort(np.asarray(scores, np.float64), axis=None)
  cut = ordered.size // 4
  return float(ordered[cut : ordered.size - cut].mean())


def stratified_bootstrap_interval(
  scores: np.ndarray,
  seed: int = 0,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> Interval:
  """Interquartile mean over [S, M] with a stratified percentile bootstrap.

  Agarwal et al. 2021 (rliable): within each task, seeds are drawn with
  replacement, so each resample holds every task equally often. This treats
  the runs of different tasks as independent; the tasks of one meta-learner
  share a policy, so read it as the spread over seed-task scores and use
  `t_interval` for claims about the algorithm.

  Args:
    scores: [S, M].
    seed: of the generator, so that the same call gives the same numbers.
    resamples: number of bootstrap resamples.
    confidence: nominal coverage.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or not scores.size:
    raise ValueError(f'scores must be [S, M], got {scores.shape}')
  num_seeds, num_tasks = scores.shape
  point = interquartile_mean(scores)
  if num_seeds == 1:
    return Interval(point, None, None, 1, 'one seed has no spread')
  rng = np.random.default_rng(seed)
  tasks = np.arange(num_tasks)
  draws = [
    interquartile_mean(
      scores[rng.integers(num_seeds, size=(num_seeds, num_tasks)), tasks]
    )
    for _ in range(resamples)
  ]
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail])
  return Interval(point, float(low), float(high), num_seeds)


def probability_of_improvement(
  scores: np.ndarray, baseline: np.ndarray
) -> float:
  """P(a run of `scores` beats a run of `baseline` on the same task).

  Mean over tasks of the Mann-Whitney statistic; a tie counts one half.

  Args:
    scores: [S, M].
    baseline: [S', M], the same tasks in the same order.
  """
  scores, baseline = np.asarray(scores), np.asarray(baseline)
  if (
    scores.ndim != 2
    or baseline.ndim != 2
    or (scores.shape[1] != baseline.shape[1])
  ):
    raise ValueError(
      f"need [S, M] and [S', M], got {scores.shape} and {baseline.shape}"
    )
  delta = scores[:, None, :] - baseline[None, :, :]
  return float(np.mean(delta > 0) + 0.5 * np.mean(delta == 0))


def band(
  values: np.ndarray, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mean and t band over the last axis, for curves.

  Args:
    values: [..., S], NaN where a seed has no value.
    confidence: nominal coverage.

  Returns:
    mean, low, high, each [...]; low and high equal the mean where fewer than
    two seeds are finite, all are NaN where none is.
  """
  values = np.asarray(values, np.float64)
  exists = np.isfinite(values)
  count = exists.sum(-1)
  total = np.where(exists, values, 0.0).sum(-1)
  mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
  square = np.where(exists, (values - mean[..., None]) ** 2, 0.0).sum(-1)
  freedom = np.maximum(count - 1, 1)
  half = _t_quantile(confidence, freedom) * np.sqrt(
    square / freedom / np.maximum(count, 1)
  )
  half = np.where(count > 1, half, 0.0)
  return mean, mean - half, mean + half


def _t_quantile(confidence: float, freedom: int | np.ndarray) -> np.ndarray:
  """Student's t that `confidence` of a central interval ends at.

  As scipy.stats.t.ppf, whose import takes over half a second.
  """
  return special.stdtrit(freedom, 0.5 + confidence / 2)


def _error(scores: np.ndarray) -> float:
  """Standard error of the mean of [S]."""
  return float(scores.std(ddof=1) / np.sqrt(scores.size))


def _paired(
  first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both as float [S]; ValueError where they are not a pair."""
  first, second = np.asarray(first, float), np.asarray(second, float)
  if first.ndim != 1 or first.shape != second.shape or not first.size:
    raise ValueError(
      f'paired scores need one shape [S], got {first.shape} and {second.shape}'
    )
  return first, second
