"""How fast `train.fit` is beside a plain PyTorch loop. See `python -m benchmarks --help`."""
