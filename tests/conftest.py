"""What every test may rely on."""
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")           # two workers on two cores
os.environ.pop("MPLBACKEND", None)                      # kernels inherit it and draw no figure
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)         # every kernel would compile torch anew
sys.dont_write_bytecode = False
