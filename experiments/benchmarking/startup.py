"""From the start of a process to its first finished update."""

import statistics
import tempfile
import time
from typing import Any

from experiments.benchmarking import processes
from experiments.benchmarking.options import Options
from experiments.benchmarking.report import say
from experiments.benchmarking.timing import EventCount, rounded

_MAX_REPEATS = 3


def measure_startup(options: Options) -> list[dict[str, Any]]:
  """With an empty and then with a filled cache of compiled programs.

  One seed of SMAC's offline phase at the 'cpu' sizes (in 'smoke' at those),
  one update per call, on one device, with the compilation cache of real runs
  in a temporary folder. Seconds count from before the process was started.
  """
  profile = 'smoke' if options.profile == 'smoke' else 'cpu'
  starts = {'empty': [], 'filled': []}
  for i in range(min(options.repeats, _MAX_REPEATS)):
    with tempfile.TemporaryDirectory() as folder:
      for cache, times in starts.items():
        say(f'starting with the cache {cache}, round {i + 1}')
        environment = {
          'JAX_COMPILATION_CACHE_DIR': folder,
          'JAX_ENABLE_COMPILATION_CACHE': 'true',
        }
        with processes.Worker(
          __name__, environment, profile=profile, begin=time.time()
        ) as worker:
          times.append(worker.receive())
  return [
    {
      'profile': profile,
      'cache': cache,
      'starts': len(times),
      **{
        name: rounded(statistics.median(each[name] for each in times))
        for name in times[0]
      },
    }
    for cache, times in starts.items()
  ]


def _main():
  given = processes.argument()
  since_start = lambda: time.time() - given['begin']
  # What a run imports is part of its start.
  from experiments.benchmarking import cases, updates
  from experiments.runs import jax_settings
  from offmeta import parallel

  seconds = {'imported_s': since_start()}
  hits = EventCount('/jax/compilation_cache/cache_hits')
  jax_settings.configure()
  [case] = cases.first_cases(given['profile'], ('smac',))
  runner = updates.UpdateRunner(
    case, chunk=1, layout=parallel.make_layout(1, max_devices=1)
  )
  seconds['initialised_s'] = since_start()
  runner()
  seconds['first_update_s'] = since_start()
  processes.reply({**seconds, 'programs_from_cache': hits.number})


if __name__ == '__main__':
  _main()
