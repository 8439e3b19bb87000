"""The HTML page of a run: one file, no network, no scripts."""

import base64
from collections.abc import Mapping
import html
from typing import Any

from offmeta.results import findings, panels, records, tables

# Picture -> (title, what to look for), in the order of the page.
CAPTIONS = {
  'training': (
    'Return over training',
    'Lines are means over seeds, bands 95% t intervals over seeds.',
  ),
  'rows': (
    'The table as a picture',
    'Each dot is the mean over seeds, each bar its 95% interval; a dot '
    'without a bar has one seed. The paired rows of the table are the '
    'sharper comparison, because they compare within a seed.',
  ),
  'episodes': (
    'Return per adaptation episode',
    'The first episodes act on the prior, later ones on the posterior of '
    'what was seen so far. Look for the rise from first to last episode: '
    'that is adaptation. On training tasks the gap between the dashed '
    'line (offline context) and the solid one (self-collected context) is '
    'the distribution shift. Bands are 95% t intervals over seeds.',
  ),
  'finetune': (
    'Online fine-tuning',
    'A learner of its own goes on training in each held-out task. Look '
    'for a steep rise: few steps should be enough. The step before it '
    'uses logged transitions of a random policy only. The band is the '
    '95% t interval over seeds.',
  ),
  'z_space': (
    'Where contexts land in z-space',
    'Posterior means of training tasks, first seed, projected to their '
    'principal components; the axes say how much of the variance each holds. '
    'Where the hollow points (self-collected) lie away from the filled ones '
    'of their task, links are long: that is the distribution shift.',
  ),
  'trajectories': (
    'Paths in held-out tasks',
    'First seed, first repetition, seen from above. Tasks are spread over '
    'the quantiles of the return of the last episode, the worst on the left, '
    'the best on the right. Above each panel stand the number that '
    'experiments.render --task takes, and that return. Early episodes are '
    'light, the last is dark; a star is the goal, where a task has one.',
  ),
  'diagnoses': (
    'What the learner knows',
    'Measured by the algorithm on its training tasks, for each loop that '
    'was tested. Lines are means over seeds, bands and bars 95% t intervals '
    'over seeds; maps are means over seeds.',
  ),
  'wall_time': (
    'Where the wall time went',
    'Seconds by phase, compilation included.',
  ),
}
# What a run with an online phase adds to them.
_ONLINE_CAPTIONS = {
  'training': (
    'Left of the switch the offline phase, right of it each online '
    'variant, each half on its own scale of updates. Look at the upper '
    'panel: does the line rise after the switch, and how near does it '
    'come to the dashed oracle? The lower panels are with offline contexts: '
    'they should be high before the switch already and stay there.'
  ),
  'z_space': (
    'Both panels share their axes. After the online phase links should be '
    'short and colours in order.'
  ),
}

_CSS = """
:root { color-scheme: light dark; --fg: #1d2329; --bg: #ffffff;
  --soft: #5c6770; --line: #dde2e6; --tint: #f4f6f8; --mark: #e8f2fa; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7ea; --bg: #15191d;
  --soft: #9aa5ae; --line: #323a41; --tint: #1d2328; --mark: #16303f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem;
  color: var(--fg); background: var(--bg); line-height: 1.5;
  font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, li, figcaption { max-width: 48rem; }
.finding { font-size: 1.15rem; }
.warning { font-size: 1.15rem; padding: .6rem .9rem; border-radius: 6px;
  background: var(--mark); }
.facts { color: var(--soft); margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .34rem .7rem .34rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th:nth-child(2), th:nth-child(4) { text-align: right; }
.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:nth-child(2), td:nth-child(4) { text-align: right; }
table.plain td { text-align: left; }
tr.group th { text-align: left; padding-top: 1.1rem; color: var(--soft);
  font-weight: 600; }
tr.headline { background: var(--mark); }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: .86em; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px;
  overflow-x: auto; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; padding: .6rem;
  border: 1px solid var(--line); border-radius: 8px; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 3rem; }
  figure, details { overflow-x: auto; }
  figure img, details img { max-width: none; width: 46rem; }
  .main { font-size: .85rem; }
  .plain td { display: block; border: 0; padding: .1rem 0; }
  .plain td:first-child { color: var(--soft); padding-top: .5rem; }
}
summary { cursor: pointer; }
"""

_METHOD = """
<p>The score of a seed is the true return of the last adaptation episode, as a
mean over tasks and repetitions. Rows ending in <code>_self_context</code> adapt
to a self-collected context: each repetition starts with nothing, and the first
episodes act on the prior. The row <code>_unadapted</code> is an episode without
any context, in which the policy learns nothing. Rows ending in
<code>_given_context</code> adapt to an offline context from the dataset of the
held-out task, those in <code>_random_context</code> to uniform random actions.
On training tasks, rows ending in <code>_offline_context</code> adapt to an
offline context, rows starting with <code>train_</code> to a self-collected one.
Rows ending in <code>_adaptation</code> and <code>_adaptation_given</code> are
after minus before adapting on held-out tasks, within a seed. A shift is the
return with an offline context minus that with a self-collected one, on training
tasks, within a seed.</p>
"""
_ONLINE_METHOD = """
<p><code>online</code> rows follow the headline variant, <b>{headline}</b>, and
a name after a slash is another variant. <code>online_minus_offline</code> is
a difference within a seed. <code>gap_closed</code> is (online &minus; offline)
/ (oracle &minus; offline) on held-out tasks, with Fieller's interval of a ratio
of means.</p>
"""
_UNIT = """
<p>The unit of replication is the seed. Intervals are 95% Student t intervals
over seeds; with few seeds a bootstrap would be too narrow. With one seed there
is no interval, and the data-collecting policy and the logged data are one
sample.</p>
"""


def render(
  record: records.Record,
  summary: Mapping[str, Any],
  pictures: Mapping[str, bytes],
  logged: Mapping[str, bytes] = {},
) -> str:
  """The whole page.

  Args:
    record: the run.
    summary: its summary.
    pictures: file stem -> PNG bytes; embedded.
    logged: group of metrics -> PNG bytes; embedded, collapsed.
  """
  run = record.run
  title = ' '.join(filter(None, [run.algorithm.upper(), 'on', run.family]))
  facts = [
    f'profile {run.profile}' if run.profile else '',
    f'{run.num_seeds} seed' + ('s' if run.num_seeds != 1 else ''),
    f'headline variant {run.headline_variant}' if run.headline_variant else '',
    f'config {run.config_hash[:12]}' if run.config_hash else '',
  ]
  online = _ONLINE_METHOD.format(headline=html.escape(run.headline_variant))
  parts = [
    f'<h1>{html.escape(title)}</h1>',
    f'<p class="facts">{html.escape(" · ".join(filter(None, facts)))}</p>',
    _finding(summary),
    *[
      _figure(name, pictures[name], bool(run.headline_variant))
      for name in CAPTIONS
      if name in pictures
    ],
    _variants(record),
    _logged(logged),
    _diagnostics(summary),
    _table(summary, online if run.headline_variant else ''),
    _timing(record.timing),
    _origin(record),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n'
    '<body>\n' + '\n'.join(filter(None, parts)) + '\n</body></html>\n'
  )


def _finding(summary: Mapping[str, Any]) -> str:
  """One sentence, three rows, and what blew up."""
  said = html.escape(findings.sentence(summary))
  kind = 'warning' if summary.get('profile') == 'smoke' else 'finding'
  main = ('random', 'offline_self_context', 'online_self_context')
  if not summary['headline_variant']:
    main = ('random', 'offline_unadapted', 'offline_self_context')
  cells = ''.join(
    f'<tr><td>{html.escape(row.words)}</td><td class="n">{row.mean}</td>'
    f'<td class="n">{row.interval}</td></tr>'
    for row in findings.rows(summary)
    if row.name in main
  )
  return (
    (f'<p class="{kind}">{said}</p>' if said else '')
    + '<table class="main"><thead><tr><th>Return on held-out tasks, last'
    ' adaptation episode</th><th>mean</th><th>95% interval</th></tr></thead>'
    f'<tbody>{cells}</tbody></table>'
    f'<p>{html.escape(tables.divergence_note(summary))}</p>'
  )


def _table(summary: Mapping[str, Any], online: str) -> str:
  """All rows, folded, and how they are read."""
  return (
    '<h2>Every row</h2><details><summary>The whole table, as in'
    ' <code>summary.json</code></summary>'
    f'<div class="scroll">{tables.html_table(summary)}</div>'
    f'<h3>How to read it</h3>{_METHOD}{online}{_UNIT}</details>'
  )


def _variants(record: records.Record) -> str:
  """What each online variant does."""
  if not record.run.variants:
    return ''
  rows = [(name, text) for name, text in record.run.variants.items()]
  return '<h2>Variants of the online phase</h2>' + _plain(rows)


def _figure(name: str, png: bytes, online: bool) -> str:
  """A captioned picture."""
  title, caption = CAPTIONS[name]
  if online and name in _ONLINE_CAPTIONS:
    caption = f'{_ONLINE_CAPTIONS[name]} {caption}'
  return (
    f'<h2>{html.escape(title)}</h2><figure>{_image(title, png)}'
    f'<figcaption>{html.escape(caption)}</figcaption></figure>'
  )


def _image(title: str, png: bytes) -> str:
  """An embedded picture."""
  data = base64.b64encode(png).decode()
  return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _logged(pictures: Mapping[str, bytes]) -> str:
  """Pictures of all metrics, a closed fold for each group."""
  if not pictures:
    return ''
  folds = ''.join(
    f'<details><summary><code>{html.escape(name)}</code></summary>'
    f'{_image(name, png)}</details>'
    for name, png in pictures.items()
  )
  return (
    '<h2>All metrics of training</h2><p>By the beginning of their names, '
    'against the updates of their loop. Lines are means, bands 95% t '
    'intervals, over seeds (over learners, where a loop trains one for each '
    'task); neighbouring rows of long logs are averaged. What leaves a panel '
    f'is in <code>metrics.jsonl</code>.</p>{folds}'
  )


def _diagnostics(summary: Mapping[str, Any]) -> str:
  """Shift in z, and what the algorithm says of itself in one number."""
  names = {
    'kl_offline': 'KL to the prior, offline context (nats)',
    'kl_self': 'KL to the prior, self-collected context (nats)',
    'normalized_shift': 'normalised shift (0: none)',
  }
  rows = []
  for point, entry in summary['diagnostics'].items():
    for name, value in entry.items():
      if value['mean'] is not None:
        text = names.get(name, panels.words(name))
        shown = f'{value["mean"]:.3g}'
        if value['low'] is not None:
          shown += f' [{value["low"]:.3g}, {value["high"]:.3g}]'
        rows.append((f'{point}: {text}', shown))
  return '<h2>Diagnostics</h2>' + _plain(rows) if rows else ''


def _timing(timing: Mapping[str, float]) -> str:
  """Seconds per phase."""
  if not timing:
    return ''
  rows = [(name, f'{seconds:.1f} s') for name, seconds in timing.items()]
  rows.append(('total', f'{sum(timing.values()):.1f} s'))
  return '<h2>Timing</h2>' + _plain(rows)


def _origin(record: records.Record) -> str:
  """Command, versions, machine, full config."""
  run = record.run
  facts = [*run.versions.items(), *run.machine.items()]
  output = ['<h2>How it was made</h2>']
  if run.command:
    output.append(f'<pre>{html.escape(run.command)}</pre>')
  output.append(_plain(facts) if facts else '')
  if run.config:
    output.append(
      f'<details><summary>Configuration ({html.escape(run.config_hash)})'
      f'</summary>{_plain(tables.flat(run.config))}</details>'
    )
  return '\n'.join(output)


def _plain(rows: Any) -> str:
  """Two columns, name and value."""
  body = ''.join(
    f'<tr><td><code>{html.escape(str(name))}</code></td>'
    f'<td>{html.escape(str(value))}</td></tr>'
    for name, value in rows
  )
  return f'<div class="scroll"><table class="plain">{body}</table></div>'
