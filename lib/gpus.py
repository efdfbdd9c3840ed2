"""One GPU to each run on a machine with several: a lock on a file per GPU, freed by the kernel when its holder dies."""
import contextlib
import itertools
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from lib import BookError, locks


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; without importing torch.

    All of the machine's by UUID, or those that CUDA_VISIBLE_DEVICES names, as it names them: CUDA does not number them
    as nvidia-smi does. So processes that share a machine should all be given numbers, or all UUIDs, or nothing.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present()
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, chosen.split(","))))


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
        time.sleep(locks.KERNEL_ENDS if waited else 0)
        yield device


def _free(devices: list[str], folder: Path, held: contextlib.ExitStack) -> str | None:
    """The first GPU whose lock can be had, which `held` then keeps; None: all are taken."""
    for device in devices:
        path = folder / f"vaebook-gpu-{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"
        file = open(path, "r+", opener=_opened)
        if locks.locked(file):
            held.enter_context(file)
            return device
        file.close()
    return None


def _opened(path: str, flags: int) -> int:
    """Open a lock file that all users of the machine share; make it if need be. BookError if it cannot be opened."""
    with contextlib.suppress(FileExistsError):                    # of another user: O_CREAT alone would be refused
        file = os.open(path, flags | os.O_CREAT | os.O_EXCL)
        os.fchmod(file, 0o666)                                    # whatever the umask is
        return file
    try:
        return os.open(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        raise BookError(f"cannot open {path}, the lock of a GPU ({error.strerror}): remove it") from None
