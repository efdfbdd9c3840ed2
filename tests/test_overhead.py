"""What a sweep costs beside plain papermill: the 36 smoke runs of semantic hashing, two at a time, a thread each.

`pytest -m slow -s tests/test_overhead.py` prints the figures; takes nine minutes of two idle cores.
"""
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from fresh_clone import environment, fresh_clone, skip_without_snakemake

from lib import sweeps

CORES = 2


def measured(work):
    """((seconds, CPU seconds, MiB of the largest process that this one has ended so far), the result) of work()."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (time.monotonic() - began, cpu, after.ru_maxrss / 1024), result


@pytest.mark.slow
def test_a_run_of_a_sweep_costs_little_more_than_plain_papermill(tmp_path):
    skip_without_snakemake()
    book, sweep = fresh_clone(tmp_path / "book"), sweeps.load("semantic-hashing")

    def python(*words):
        done = subprocess.run([sys.executable, "-m", *words], cwd=book, env=environment(book), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert not done.returncode, done.stdout
        return done.stdout

    def papermill(one):
        python("papermill", "--no-progress-bar", "--cwd", "notebooks", "notebooks/semantic-hashing.ipynb",
               str(tmp_path / f"{one.index}.ipynb"), "-y", yaml.safe_dump(one.changes))

    def side_by_side():
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(papermill, sweep))
    papermill(sweep(0))                                          # compiles what is compiled once
    plain, _ = measured(side_by_side)
    shutil.rmtree(book / "runs")                                 # where plain papermill leaves its results, too
    ours, said = measured(lambda: python("lib", "sweep", "semantic-hashing", "--cores", str(CORES)))
    n, (wall, cpu, memory) = len(sweep), (b - a for a, b in zip(plain, ours, strict=True))
    for name, told in (("plain papermill", plain), ("the sweep", ours)):
        print("{:16}{:7.1f} s{:8.1f} CPU s, largest process {:5.0f} MiB".format(name, *told))
    print(f"more for each of {n} runs: {CORES * wall / n:.2f} s of a core, {cpu / n:.2f} CPU s "
          f"(load {os.getloadavg()[0]:.1f})")
    assert n == 36 and "36 runs, 36 to do" in said and "36 of 36 runs are done" in said
    assert CORES * wall / n < 3 and cpu / n < 3
    assert memory < 100
