"""From a record to the numbers of the report, as one JSON-ready dict.

The schema is fixed (other tooling reads it): `rows` and `paired` map names to
{mean, low, high, seeds}. Rows that cannot be computed are absent; the paired
entries of a run are always there, with nulls and a reason where needed. A run
without online variants has no row and no entry of an online phase.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from offmeta.results import records, statistics

SeedScores = Mapping[str, np.ndarray]  # row name -> [S]

# What is handed to the meta-learner on held-out tasks -> (array, its score).
# Some explore with noise before they adapt, or adapt within an episode: where
# it is there, the score without any context counts as un-adapted
# ('test_prior_returns').
HELD_OUT = {
  'unadapted': ('test_self_returns', statistics.unadapted_scores),
  'self_context': ('test_self_returns', statistics.seed_scores),
  'given_context': ('test_offline_returns', statistics.seed_scores),
  'random_context': ('test_uniform_returns', statistics.seed_scores),
}
# Environment steps at which fine-tuning is reported (those of MACAW's figures).
_FINETUNE_STEPS = {'10k': 10_000, '20k': 20_000}


def summarize(record: records.Record) -> dict[str, Any]:
  """Every number of the report.

  Args:
    record: what `records.load` returned.

  Returns:
    The contents of summary.json: no NaN, plain Python types only.
  """
  run = record.run
  scores = seed_scores(record)
  return {
    'rows': {
      name: statistics.t_interval(values).as_dict()
      for name, values in scores.items()
    },
    'paired': _all_paired(scores, bool(run.headline_variant)),
    'command': run.command,
    'wall_time_s': sum(record.timing.values()) if record.timing else None,
    'config_hash': run.config_hash,
    'headline_variant': run.headline_variant,
    'oracle_variant': run.oracle_variant,
    'variants': _variants(record, scores),
    'robust': _robust(record),
    'diagnostics': _diagnostics(record),
    'diverged': _diverged(record),
  }


def seed_scores(record: records.Record) -> dict[str, np.ndarray]:
  """Row name -> [S] scores, in the order of the table.

  Rows of a phase that has not run are absent.
  """
  run, scores = record.run, {}

  def add(name, array, score=statistics.seed_scores):
    if array is not None:
      scores[name] = score(array)

  headline, oracle = run.headline_variant, run.oracle_variant
  add('random', record.array('collect', 'random_test_returns'))
  add('behaviour', record.array('collect', 'behaviour_test_returns'))
  one_number = lambda array: np.array([array.mean()])  # one dataset
  add(
    'specialists',
    record.array('collect', 'specialist_test_returns'),
    one_number,
  )
  for phase, point in (
    ('offline', 'offline'),
    ('online', f'online-{headline}'),
  ):
    scores.update(
      {
        f'{phase}_{name}': values
        for name, values in held_out_scores(record, point).items()
      }
    )
  for name in record.other_variants:
    add(f'online_self_context/{name}', record.online(name, 'test_self_returns'))
  add('oracle', record.online(oracle, 'test_self_returns'))
  scores.update(finetune_scores(record))
  add(
    'behaviour_data',
    record.array('collect', 'behaviour_data_returns'),
    one_number,
  )
  add(
    'train_specialists',
    record.array('collect', 'specialist_train_returns'),
    one_number,
  )
  rows = (
    ('offline_context', '', 'train_offline_returns'),
    ('self_context', 'train_', 'train_self_returns'),
  )
  for suffix, prefix, key in rows:
    add(f'{prefix}offline_{suffix}', record.array('offline', key))
  for variant in [headline, *record.other_variants, oracle]:
    tail = '' if variant == headline else f'/{variant}'
    for suffix, prefix, key in rows:
      add(f'{prefix}online_{suffix}{tail}', record.online(variant, key))
  return scores


def held_out_scores(
  record: records.Record, point: str
) -> dict[str, np.ndarray]:
  """Scores [S] on held-out tasks by what the meta-learner was handed.

  Args:
    record: the run.
    point: 'offline' or 'online-VARIANT'.

  Returns:
    By the keys of `HELD_OUT`; those that the run does not have are absent.
  """
  arrays = record.evaluations.get(point, {})
  scores = {
    name: score(arrays[array])
    for name, (array, score) in HELD_OUT.items()
    if array in arrays
  }
  if 'test_prior_returns' in arrays:
    scores['unadapted'] = statistics.unadapted_scores(
      arrays['test_prior_returns']
    )
  return scores


def finetune_scores(record: records.Record) -> dict[str, np.ndarray]:
  """Scores [S] along online fine-tuning in each held-out task.

  The meta-policy, after the offline step on random data, then at the
  evaluations nearest to some numbers of steps that every learner reached, and
  at the end. Empty without fine-tuning.
  """
  returns = record.array('finetune', 'finetune_returns')
  if returns is None:
    return {}
  found = {'finetune_meta': returns[..., 0]}
  if returns.shape[-1] > 1:
    found['finetune_start'] = returns[..., 1]
  online = returns[..., 2:]
  if online.shape[-1]:
    steps = record.array('finetune', 'finetune_env_steps')[..., 2:]
    for name, target in _FINETUNE_STEPS.items():
      if steps.max(-1).min() >= target:
        found[f'finetune_{name}'] = statistics.nearest(online, steps, target)
    found['finetune_end'] = online[..., -1]
  return {name: values.mean(-1) for name, values in found.items()}


def _all_paired(scores: SeedScores, online: bool) -> dict[str, Any]:
  """The paired entries of a run, of the headline variant if it has one."""
  results = {}
  if online:
    headline = variant_results(scores, '')
    results = {
      name: headline[name] for name in ('online_minus_offline', 'gap_closed')
    }
  results['shift_before'] = _paired(
    statistics.paired_difference,
    scores,
    'offline_offline_context',
    'train_offline_self_context',
  )
  if online:
    results['shift_after'] = headline['shift_after']
  for phase in ('offline', 'online') if online else ('offline',):
    for name, context in (('', 'self'), ('_given', 'given')):
      results[f'{phase}_adaptation{name}'] = _paired(
        statistics.paired_difference,
        scores,
        f'{phase}_{context}_context',
        f'{phase}_unadapted',
      )
  return results


def variant_results(
  scores: SeedScores, tail: str, self_row: str | None = None
) -> dict[str, Any]:
  """Paired results of one variant.

  Args:
    scores: row name -> [S].
    tail: '' for the headline, '/NAME' for another variant.
    self_row: name of its held-out row where that is not the usual one.
  """
  after = self_row or f'online_self_context{tail}'
  return {
    'online_minus_offline': _paired(
      statistics.paired_difference, scores, after, 'offline_self_context'
    ),
    'gap_closed': _paired(
      statistics.gap_closed, scores, 'offline_self_context', after, 'oracle'
    ),
    'shift_after': _paired(
      statistics.paired_difference,
      scores,
      f'online_offline_context{tail}',
      f'train_online_self_context{tail}',
    ),
  }


def _paired(
  function: Callable[..., statistics.Interval],
  scores: SeedScores,
  *names: str,
) -> dict[str, Any]:
  """`function` of some rows, nulls with a reason where one is missing."""
  missing = [name for name in names if name not in scores]
  if missing:
    return statistics.Interval(
      None, None, None, 0, f'no row {", ".join(missing)}'
    ).as_dict()
  return function(*(scores[name] for name in names)).as_dict()


def _variants(record: records.Record, scores: SeedScores) -> dict[str, Any]:
  """Every variant under its own name, with its scores and comparisons."""
  run, result = record.run, {}
  for name, description in run.variants.items():
    tail = '' if name == run.headline_variant else f'/{name}'
    row = f'online_self_context{tail}'
    if tail and name == run.oracle_variant:
      row = 'oracle'
    entry = {'description': description, 'row': row}
    if row in scores:
      entry['self_context'] = statistics.t_interval(scores[row]).as_dict()
      entry.update(variant_results(scores, tail, row))
    result[name] = entry
  return result


def _robust(record: records.Record) -> dict[str, Any]:
  """Interquartile means on held-out tasks, for readers who prefer them."""
  offline = record.array('offline', 'test_self_returns')
  online = record.online(record.run.headline_variant, 'test_self_returns')
  oracle = record.online(record.run.oracle_variant, 'test_self_returns')
  result: dict[str, Any] = {'interquartile_mean': {}}
  for name, returns in (
    ('offline_self_context', offline),
    ('online_self_context', online),
    ('oracle', oracle),
  ):
    if returns is not None:
      result['interquartile_mean'][name] = (
        statistics.stratified_bootstrap_interval(
          statistics.task_scores(returns)
        ).as_dict()
      )
  if online is not None and offline is not None:
    result['probability_online_above_offline'] = (
      statistics.probability_of_improvement(
        statistics.task_scores(online), statistics.task_scores(offline)
      )
    )
  return result


def _diagnostics(record: records.Record) -> dict[str, Any]:
  """Distribution shift in z and what the algorithm says in one number.

  Returns:
    Point -> quantity -> interval over seeds.
  """
  result = {}
  for point, arrays in record.evaluations.items():
    entry = {}
    shown = {
      name: arrays[name].reshape(len(arrays[name]), -1).mean(-1)
      for name in ('kl_offline', 'kl_self', 'normalized_shift')
      if name in arrays
    }
    shown |= {
      name: values
      for name, values in records.diagnoses(arrays).items()
      if values.ndim == 1
    }
    for name, values in shown.items():
      if np.isfinite(values).all():
        entry[name] = statistics.t_interval(values).as_dict()
      else:
        entry[name] = statistics.Interval(
          None, None, None, len(values), 'not finite'
        ).as_dict()
    if entry:
      result[point] = entry
  return result


def _diverged(record: records.Record) -> dict[str, int]:
  """Simulation steps that blew up: where -> count, over seeds; no zeros.

  The places overlap: a step gathered in a loop may be in the dataset, too.
  """
  arrays = {
    'dataset': record.array('collect', 'dataset_diverged'),
    'random policy': record.array('collect', 'random_diverged'),
    'test of behaviour': record.array('collect', 'behaviour_diverged'),
    'test of specialists': record.array('collect', 'specialist_diverged'),
  }
  counts = {
    place: int(array.sum())
    for place, array in arrays.items()
    if array is not None
  }
  for loop, metrics in record.metrics.items():
    counts[loop] = sum(
      int(series.values.sum())
      for name, series in metrics.items()
      if name.endswith('/diverged')
    )
  for point, scores in record.evaluations.items():
    if 'diverged' in scores:
      counts[f'test of {point.replace("-", "/", 1)}'] = int(
        scores['diverged'].sum()
      )
  return {place: count for place, count in counts.items() if count}
