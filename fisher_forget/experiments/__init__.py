"""One YAML, one run: data sets, models, training, runs, evaluations and comparisons, from files or
the command line."""
