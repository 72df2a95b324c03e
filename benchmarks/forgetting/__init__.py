"""`forget(model, loader, forget_idx)`, as it is written, held against retrained models: `python -m
benchmarks.forgetting`."""
