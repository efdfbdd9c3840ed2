"""Runs on a machine with several GPUs: no two of them get the same, and one that is killed gives its own back."""
import contextlib
import errno
import os
import stat
import subprocess
import sys
import time

import pytest
from fresh_clone import until

from lib import BookError, gpus, locks

TWO = ["GPU-one", "GPU-two"]
WORKER = """
import sys, time
from pathlib import Path
from lib import gpus
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with gpus.taken(["GPU-one", "GPU-two"], folder, every=0.02) as device:
    mark = folder / f"in-use-{device}"
    mark.touch(exist_ok=False)                      # fails if another run is on it
    (folder / f"{name}.has").write_text(device)
    time.sleep(seconds)
    mark.unlink()
"""


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def worker(folder, name, seconds):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), name, str(seconds)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_many_runs_share_two_gpus_and_no_two_the_same(tmp_path):
    workers = [worker(tmp_path, f"run-{i}", 0.2) for i in range(8)]
    said = [process.communicate(timeout=120)[0] for process in workers]
    assert [process.returncode for process in workers] == [0] * 8, said
    assert {path.read_text() for path in tmp_path.glob("*.has")} == set(TWO)
    assert any("all 2 GPUs are taken: waiting for one" in text for text in said)


def test_a_killed_run_frees_its_gpu(tmp_path):
    first, second = worker(tmp_path, "first", 100), worker(tmp_path, "second", 100)
    until(lambda: len(list(tmp_path.glob("*.has"))) == 2, "two workers")
    waiting = worker(tmp_path, "third", 0)
    time.sleep(0.5)
    assert waiting.poll() is None
    device = (tmp_path / "first.has").read_text()
    (tmp_path / f"in-use-{device}").unlink()
    first.kill()
    first.communicate(timeout=20)
    assert waiting.wait(timeout=20) == 0 and (tmp_path / "third.has").read_text() == device
    waiting.communicate(), second.kill(), second.communicate(timeout=20)


def test_who_waited_leaves_the_kernel_of_a_killed_run_time_to_end(tmp_path, monkeypatch):
    slept, freed = [], contextlib.ExitStack()
    freed.enter_context(gpus.taken(TWO[:1], tmp_path))
    monkeypatch.setattr(gpus.time, "sleep", lambda seconds: (slept.append(seconds), freed.close()))
    with gpus.taken(TWO[:1], tmp_path, every=0.5):
        assert slept == [0.5, locks.KERNEL_ENDS]


def test_other_users_can_open_the_lock_whatever_the_umask_was(tmp_path):
    before = os.umask(0o077)
    try:
        with gpus.taken(TWO, tmp_path):
            pass
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o666]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_gpu_that_is_taken(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(BookError, match="GPU-one.lock is on a file system that cannot lock .*: mount it with locks"), \
            gpus.taken(TWO, tmp_path):
        pass


def test_a_lock_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "vaebook-gpu-GPU-one.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BookError, match="cannot open .*GPU-one.lock, the lock of a GPU .*: remove it"), \
            gpus.taken(TWO, tmp_path):
        pass


def test_without_a_gpu_nothing_is_taken_and_nothing_waits(tmp_path):
    with gpus.taken([], tmp_path) as one, gpus.taken([], tmp_path) as other:
        assert one is other is None
    assert not list(tmp_path.iterdir())


def test_a_single_gpu_that_somebody_has_chosen_stays_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")               # as Slurm does: every job's own is its number 0
    with gpus.taken(["GPU-one"], tmp_path) as one, gpus.taken(["GPU-one"], tmp_path) as other:
        assert one is other is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with gpus.taken(["GPU-one"], tmp_path) as one:
        assert one == "GPU-one"


def smi(tmp_path, monkeypatch, text):
    """Let `nvidia-smi` say so."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11-aa)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22-bb)"


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, LISTED)
    assert gpus.visible() == ["GPU-11-aa", "GPU-22-bb"]
    code = "import sys; from lib import gpus; print(len(gpus.visible()), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 False\n"


def test_slices_count_in_place_of_the_gpu_that_they_are_of(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "GPU 0: NVIDIA A100 (UUID: GPU-11)\n"
        "  MIG 1g.5gb     Device  0: (UUID: MIG-33)\n  MIG 1g.5gb     Device  1: (UUID: MIG-44)\n"
        "GPU 1: NVIDIA A100 (UUID: GPU-22)")
    assert gpus.visible() == ["GPU-22", "MIG-33", "MIG-44"]


@pytest.mark.parametrize(("chosen", "left"), [
    ("1", ["1"]), ("1, 0", ["1", "0"]), ("GPU-22-bb", ["GPU-22-bb"]), ("", []), ("-1", []), ("1,-1,0", ["1"])])
def test_what_somebody_has_chosen_is_respected_and_keeps_its_numbers(tmp_path, monkeypatch, chosen, left):
    smi(tmp_path, monkeypatch, LISTED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible() == left


def test_a_machine_without_a_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "Path", lambda *_: tmp_path / "nowhere")
    assert gpus.visible() == []
