"""What a step needs and what the machine can do: operations and bytes, ceilings, memory, who else is computing.

A step cannot take less than flop / (the device's FLOP/s) nor less than bytes / (its bytes/s), both ceilings measured
here; the larger of the two times is its roofline (Williams, Waterman, Patterson, CACM 2009).
"""
import contextlib
import ctypes
import gc
import os
import time
import warnings

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lib import train


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ what a step needs
LOOK_UPS = ("index", "index_select")                                # they read no more of a tensor than they return


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each tensor once an operator; views and allocations are free.

    Of a tensor that is looked up in, only what is found counts. It is the traffic of operators run one by one, as
    PyTorch runs them; compiled code may need less. Caches are not thought of: a step whose tensors fit into them can
    exceed the ceiling of main memory.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator, add up its tensors."""
        out = func(*args, **(kwargs or {}))
        returns = [value.alias_info for value in func._schema.returns]
        name = func._schema.name.split("::")[1]
        if name.startswith(("empty", "new_empty")) or any(alias and not alias.is_write for alias in returns):
            return out
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        changed = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        made = [value for value, alias in zip(out if len(returns) > 1 else [out], returns, strict=False) if not alias]
        if name in LOOK_UPS and _size(given["self"]) > _size(out):
            given["self"] = out
        self.bytes += sum(_size(t) for t in tree_leaves([list(given.values()), changed, made]) if isinstance(t, Tensor))
        return out


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())     # an expanded one is small


def needs(run) -> dict[str, int]:
    """{"flop", "bytes"} of what `run()` does; flop: matrix products and convolutions, a multiply-add being two."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        run()
    return {"flop": flops.get_total_flops(), "bytes": traffic.bytes}


# ------------------------------------------------------------------------------------------------ what the device can
def ceilings(device: torch.device) -> dict[str, float]:
    """What the device does at best: FLOP/s in fp32, bf16 and, on CUDA, tf32; "bytes": bytes/s, read and written.

    Of a large matrix product and of a convolution with many channels, whichever is faster (on a CPU they belong to two
    libraries), and of a large copy.
    """
    cuda, found = device.type == "cuda", {}
    n, images, channels, mega = (8192, 256, 256, 1024) if cuda else (1024, 16, 128, 256)
    for name in ("fp32", "tf32", "bf16") if cuda else ("fp32", "bf16"):
        own = {"device": device, "dtype": torch.bfloat16 if name == "bf16" else torch.float32}
        a = torch.rand(n, n, **own)
        x, weight = (torch.rand(*shape, **own).contiguous(memory_format=torch.channels_last)
                     for shape in ((images, channels, 32, 32), (channels, channels, 3, 3)))
        with train.precision("fp32" if name == "bf16" else name, device), torch.no_grad():
            product = 2 * n ** 3 / _fastest(lambda: torch.mm(a, a), device)                              # noqa: B023
            convolution = 18 * x.numel() * channels / _fastest(lambda: F.conv2d(x, weight, padding=1), device)  # noqa: B023
        found[name] = max(product, convolution)
    a = torch.zeros(mega * 2 ** 20, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    found["bytes"] = 2 * a.numel() / _fastest(lambda: b.copy_(a), device)
    return found


def _fastest(run, device: torch.device, repeats: int = 30) -> float:
    """Seconds of the fastest of several runs; on CUDA of ten at once, that the start does not count."""
    times, many = [], 10 if device.type == "cuda" else 1
    for _ in range(repeats + 1):                                    # the first one warms up
        wait(device)
        start = time.perf_counter()
        for _ in range(many):
            run()
        wait(device)
        times.append((time.perf_counter() - start) / many)
    return min(times[1:])


def share(needed: dict, seconds: float, ceiling: dict, precision: str) -> dict:
    """What a step of the given need and duration achieves, and its share of the roof that binds.

    {"flop_per_s", "bytes_per_s", "flop_share", "bytes_share", "roof": "compute" | "memory", "share"}.
    """
    peak = ceiling.get(precision, ceiling["fp32"])                 # tf32 is fp32 on the CPU
    rates = {"flop_per_s": needed["flop"] / seconds, "bytes_per_s": needed["bytes"] / seconds}
    shares = {"flop_share": rates["flop_per_s"] / peak, "bytes_share": rates["bytes_per_s"] / ceiling["bytes"]}
    roof = "compute" if shares["flop_share"] >= shares["bytes_share"] else "memory"
    return rates | shares | {"roof": roof, "share": max(shares.values())}


# ------------------------------------------------------------------------------------------------ memory
class Peak:
    """`with Peak(device) as peak`: peak.mb is the most memory used inside, beyond what was in use before, in MB.

    On CUDA that PyTorch allocated; on Linux the process's resident memory; None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.mb = device, None

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)                        # freed memory back to the system
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")                                     # the peak starts anew
        except OSError:
            self.before = None
        else:
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.mb = round((torch.cuda.max_memory_allocated() - self.before) / 1e6, 1)
        elif self.before is not None:
            self.mb = round((_status("VmHWM") - self.before) / 1e6, 1)


def _status(name: str) -> int:
    """Bytes of one line of the process's status (Linux)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


# ------------------------------------------------------------------------------------------------ a busy machine
class Company:
    """`with Company() as company`: company.found says how busy others kept the machine meanwhile.

    {"cores", "load_before", "load_after" (of one minute), "others": cores' worth of work that was not this process's}.
    """

    def __enter__(self):
        self.found = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
        self.start = self._now()
        return self

    def __exit__(self, *_):
        wall, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        others = min(max(0.0, busy - own) / wall, self.found["cores"])         # the clock of /proc ticks coarsely
        self.found |= {"load_after": round(os.getloadavg()[0], 2), "others": round(others, 2)}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of the whole machine's work, of this process and its children."""
        times, own = psutil.cpu_times(), sum(os.times()[:4])
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):                     # it has just ended: counted above
                own += sum(child.cpu_times()[:2])
        busy = sum(times[:]) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        return time.monotonic(), busy, own


# ------------------------------------------------------------------------------------------------ what holds a step
def operators(run, device: torch.device, most: int = 10) -> list[dict]:
    """The operators of `run()` with the most time of their own: [{"operator", "share", "calls"}], on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profile:
        warnings.simplefilter("ignore")
        run()
        wait(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if event.device_type == DeviceType.CPU]    # not the kernels too
    found = sorted(events, key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in found) or 1
    return [{"operator": event.key, "share": getattr(event, own) / total, "calls": event.count}
            for event in found[:most]]
