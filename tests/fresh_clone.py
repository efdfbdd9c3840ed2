"""Not a test: the working tree as a clean checkout elsewhere, for the tests that run many processes in it."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import lib


def fresh_clone(folder: Path) -> Path:
    """A repository of one commit with every file of the working tree that git knows or would add."""
    source = lib.root()
    names = git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, dict.fromkeys(names)):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-q", "-m", "as it stands")
    link = folder / "workflow" / ".venv"
    if not link.exists() and (source / "workflow" / ".venv").is_dir():
        link.symlink_to(source / "workflow" / ".venv")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout


def environment(checkout: Path) -> dict:
    """Variables with which Python and its kernels take lib from the checkout, a core each."""
    left_out = {"VAEBOOK_RUN", "VAEBOOK_PRESET", "CUDA_VISIBLE_DEVICES"}
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def skip_without_snakemake() -> None:
    if not (lib.root() / "workflow" / ".venv" / "bin" / "snakemake").is_file():
        pytest.skip("Snakemake is not installed: `make sweep NAME=gmm` installs it into workflow/.venv")


def launched(checkout: Path, *words: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
    """`python -m lib` of a checkout as a process that heeds an interrupt, which a shell has it ignore in background."""
    def heed():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "lib", *words], cwd=checkout, text=True, env=environment(checkout),
                            preexec_fn=heed, stdout=subprocess.PIPE, stderr=stderr)


def until(condition, what: str, seconds: float = 120) -> None:
    """Return once the condition holds; fail after the time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def ended(processes, seconds: float = 60) -> bool:
    """Whether all psutil processes end within the time; one that nobody has reaped yet (a zombie) has ended."""
    end = time.monotonic() + seconds
    while any(map(_runs, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
