"""What `experiments.benchmark` measures, one module per part."""


class BenchmarkError(ValueError):
  """Something was asked for that cannot be measured."""
