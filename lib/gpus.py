"""One GPU to each run on a machine with several: a lock on a file per GPU, freed by the kernel when its holder dies."""
import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; without importing torch.

    All of the machine's, or those that CUDA_VISIBLE_DEVICES names: numbers become what nvidia-smi calls the GPU, so
    that two processes with different lists mean the same thing.
    """
    there = present()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    named = [word.strip() for word in chosen.split(",") if word.strip() not in ("", "-1")]
    return [there[int(name)] if name.isdigit() and int(name) < len(there) else name for name in named]


def present() -> list[str]:
    """The machine's GPUs by UUID, MIG slices in place of a GPU that is cut up; by number if there is no nvidia-smi."""
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        folder = Path("/proc/driver/nvidia/gpus")
        return [str(i) for i in range(len(list(folder.iterdir())))] if folder.is_dir() else []
    slices = re.findall(r"UUID: (MIG-[^)\s]+)", told)
    whole = re.findall(r"UUID: (GPU-[^)\s]+)\)\s*$(?!\s+MIG)", told, re.M)
    return whole + slices


@contextlib.contextmanager
def taken(devices: list[str] | None = None, folder: Path | None = None, every: float = 1.0):
    """Hold a GPU that no other run holds for the body; yields it as CUDA_VISIBLE_DEVICES takes it, or None.

    devices: those to choose from (default: `visible`); folder: of the lock files (default: the temporary one).
    Waits until one is free, looking every so many seconds, and says so once. None: there is no GPU, or somebody (Slurm,
    a person) has chosen a single one already, which stays as it is.
    """
    chosen = "CUDA_VISIBLE_DEVICES" in os.environ
    devices = visible() if devices is None else devices
    if not devices or (chosen and len(devices) == 1):
        yield None
        return
    folder, waited = folder or Path(tempfile.gettempdir()), False
    with contextlib.ExitStack() as held:
        while (device := _free(devices, folder, held)) is None:
            if not waited:
                print(f"all {len(devices)} GPUs are taken: waiting for one", flush=True)
            waited = True
            time.sleep(every)
        yield device


def _free(devices: list[str], folder: Path, held: contextlib.ExitStack) -> str | None:
    """The first GPU whose lock can be had, which `held` then keeps; None: all are taken."""
    for device in devices:
        path = folder / f"vaebook-gpu-{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
        try:
            file = os.open(path, os.O_RDONLY)              # another user's too, which only its owner may create
        except FileNotFoundError:
            file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            continue
        held.callback(os.close, file)
        return device
    return None
