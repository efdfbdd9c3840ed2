"""What every test may rely on."""
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")           # two workers on two cores
os.environ.pop("MPLBACKEND", None)                      # kernels inherit it and draw no figure
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)         # every kernel would compile torch anew
sys.dont_write_bytecode = False

import pytest  # noqa: E402 (the environment first)


@pytest.fixture
def one_thread():
    """Small tensors, on which threads cost more than they gain."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
