"""Where a result comes from: commit, versions, device, memory."""
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

from lib import root

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "pandas", "papermill")


def git_state() -> dict:
    """{"commit": hash or "unknown", "dirty": a tracked file differs, or lib, notebooks, benchmarks hold a new one}."""
    def git(*words):
        found = subprocess.run(["git", "-C", str(root()), *words], capture_output=True, text=True, check=True)
        return found.stdout.strip()
    try:
        changed = git("status", "--porcelain", "-uno") or git("status", "--porcelain", "lib", "notebooks", "benchmarks")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, and CUDA's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def device_info(name: str = "auto") -> dict:
    """{"kind": cpu | cuda, "name", "threads"} of the device that `name` leads to."""
    import torch
    if name != "cpu" and torch.cuda.is_available():
        return {"kind": "cuda", "name": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    models += [platform.processor(), platform.machine()]
    return {"kind": "cpu", "name": next(filter(None, models), "unknown"), "threads": torch.get_num_threads()}


def peak_memory_mb() -> float:
    """Peak of this process: GPU memory if CUDA was used, else resident memory, in MB."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
