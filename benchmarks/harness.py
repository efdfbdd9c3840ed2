"""Measure `train.fit` beside the plain loop of a work: in one process, in turns, each turn a number of steps.

Both begin with the same weights and train on from turn to turn, on the same data at the same size. A turn begins with a
few steps that are not timed (on CUDA `fit` captures its graph in them) and ends when the device is done. Neither writes
checkpoints.
"""
import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import roofs
from benchmarks.roofs import wait
from lib import BookError, train

LOG_EVERY = 50                       # steps between two points of fit's history, as is its default
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
LEAD = {"cpu": 1, "cuda": 20}        # untimed steps of a turn: on CUDA the warm-up, the capture, the first replay
VARIANTS = {                         # what is different from `fit` as the book calls it
    "cpu": {"bf16": {"precision": "bf16"}, "contiguous": {"contiguous": True}, "1 thread": {"threads": 1},
            "compiled": {"compiled": True}},
    "cuda": {"no graph": {"graph": False}, "1 step a replay": {"steps_per_replay": 1}, "fp32": {"precision": "fp32"},
             "bf16": {"precision": "bf16"}, "contiguous": {"contiguous": True}, "compiled": {"compiled": True},
             "3 replicas": {"replicas": 3}}}


class BenchmarkError(BookError):
    """A benchmark cannot run or be recorded; the message says why."""


# ------------------------------------------------------------------------------------------------ feeding a plain loop
def slices(data: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of a tensor that lies on the device, by slices of a permutation, epoch after epoch."""
    while True:
        order = torch.randperm(len(data), device=data.device)
        for i in range(0, len(data) - size + 1, size):
            yield data[order[i:i + size]]


def loader(data: Tensor, size: int) -> Iterator[Tensor]:
    """The same by a DataLoader; the data lie in memory, so it needs no workers."""
    parts = DataLoader(TensorDataset(data.cpu()), size, shuffle=True, drop_last=True, pin_memory=data.is_cuda)
    while True:
        yield from (batch.to(data.device, non_blocking=True) for batch, in parts)


FEEDS = {"resident slices": slices, "DataLoader": loader}


def fed(work: ModuleType, data: Tensor, device: torch.device) -> Tensor:
    """What the plain loop of a work has its batches from, on the device: the data, or what its `fed` makes of them.

    A work with `feeds` of its own has them from the data as they are.
    """
    if hasattr(work, "feeds"):
        return data
    data = data.to(device)
    return work.fed(data) if hasattr(work, "fed") else data


def feeding(data: Tensor, size: int, repeats: int = 20, feeds: dict[str, Callable] = FEEDS) -> dict[str, float]:
    """Milliseconds that a batch takes from each of the feeds."""
    found = {}
    for name, feed in feeds.items():
        batches = feed(data, size)
        next(batches)
        wait(data.device)
        start = time.perf_counter()
        for _ in range(repeats):
            next(batches)
        wait(data.device)
        found[name] = 1e3 * (time.perf_counter() - start) / repeats
    return found


def looped(step: Callable[[Tensor], dict[str, Tensor]], batches: Iterator[Tensor], item_every: int) -> Callable:
    """loop(steps) of a plain training: a step for each batch, its metrics fetched every `item_every` steps."""
    def loop(steps: int) -> list[dict[str, float]]:
        logged = []
        for t, batch in zip(range(1, steps + 1), batches, strict=False):
            metrics = step(batch)
            if t % item_every == 0:
                logged.append({name: value.item() for name, value in metrics.items()})
        return logged

    return loop


# ------------------------------------------------------------------------------------------------ the two contestants
class Plain:
    """The work's plain loop, as a careful user would write it, fed in the faster way."""

    def __init__(self, work: ModuleType, settings: dict, data: Tensor, device: torch.device):
        start = work.book(settings, data, torch.device("cpu"))["state"]     # not on the device: none of its memory
        self.device, data = device, fed(work, data, device)
        size = settings["batch"]
        feeds = work.feeds(settings, device) if hasattr(work, "feeds") else FEEDS if size < len(data) else {}
        self.feeding = feeding(data, size, feeds=feeds)
        self.feed = min(self.feeding, key=self.feeding.get) if feeds else "all of the data"
        batches = feeds[self.feed](data, size) if feeds else itertools.repeat(data)
        self.loop, self.model = work.plain(settings, data, batches, device)
        same_weights(self.model, start)
        self.metric, self.value = work.METRIC, math.nan

    def turn(self, steps: int) -> float:
        """Seconds a step; `value` becomes the mean of the work's metric in this turn."""
        self.loop(LEAD[self.device.type])
        wait(self.device)
        start = time.perf_counter()
        logged = self.loop(steps)
        wait(self.device)
        seconds = (time.perf_counter() - start) / steps
        if logged:
            self.value = sum(metrics[self.metric] for metrics in logged) / len(logged)
        return seconds


class Clocked:
    """Batches for `fit` that go on where the last call of it ended, and take the time when step `lead` begins."""

    def __init__(self, batches, device: torch.device, lead: int):
        self.batches, self.device, self.lead = batches, device, lead
        self.done, self.start = 0, 0.0

    def indices(self, first: int, count: int) -> Tensor:
        """Those of the steps done + first and on."""
        if first == self.lead:
            wait(self.device)
            self.start = time.perf_counter()
        return self.batches.indices(self.done + first, count)

    def at(self, index: Tensor) -> Tensor:
        """The batch of one row of `indices`."""
        return self.batches.at(index)


class Fit:
    """`train.fit` on the work's step, or on those of several replicas together; options as in VARIANTS."""

    def __init__(self, work: ModuleType, settings: dict, data: Tensor, device: torch.device, *, precision: str = "tf32",
                 compiled: bool = False, contiguous: bool = False, threads: int | None = None, replicas: int = 1,
                 **options):
        self.device, self.threads, self.metric = device, threads, work.METRIC
        self.options = {"numerics": precision, "log_every": LOG_EVERY, **options}
        self.value, data = math.nan, data.to(device)
        seeds = range(settings["seed"], settings["seed"] + replicas)
        self.jobs = [work.book(settings | {"seed": seed}, data, device, precision, compiled) for seed in seeds]
        for job in self.jobs:
            job |= {"folder": None, "batches": Clocked(job["batches"], device, LEAD[device.type])}
            if contiguous:
                make_contiguous(job["state"])

    def turn(self, steps: int) -> float:
        """Seconds a step (of one replica); `value` becomes the mean of the work's metric in this turn."""
        lead, clock = LEAD[self.device.type], self.jobs[0]["batches"]
        with _threads(self.threads):
            histories = train.fit_together(self.jobs, steps=lead + steps, **self.options)
            wait(self.device)
        seconds = (time.perf_counter() - clock.start) / steps
        for job in self.jobs:
            job["batches"].done += lead + steps
        self.value = windowed_mean(histories[0], self.metric)
        return seconds / len(self.jobs)


def same_weights(model: nn.Module, state: dict) -> None:
    """Give a plain model the weights of the book's modules, which come in the same order; some may be transposed."""
    own = [parameter for item in state.values() if isinstance(item, nn.Module) for parameter in item.parameters()]
    with torch.no_grad():
        for mine, its in zip(model.parameters(), own, strict=True):
            mine.copy_(its if mine.shape == its.shape else its.mT)


def windowed_mean(history: dict, metric: str) -> float:
    """The mean over steps of a history whose points are means of the steps since the last one."""
    lengths = [b - a for a, b in zip([0, *history["step"]], history["step"], strict=False)]
    return sum(n * value for n, value in zip(lengths, history[metric], strict=True)) / sum(lengths)


def make_contiguous(state: dict) -> None:
    """Undo the book's channels_last: weights and what convolutions are given become contiguous.

    Raises BenchmarkError if there is no convolution.
    """
    modules = [item.to(memory_format=torch.contiguous_format) for item in state.values() if isinstance(item, nn.Module)]
    layers = [part for module in modules for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    if not layers:
        raise BenchmarkError("the model has no convolution, so nothing is channels_last")
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))


@contextlib.contextmanager
def _threads(n: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ in turns
def in_turns(contestants: dict[str, Callable[[int], float]], seconds: float, repeats: int, multiple: int = 1) -> tuple:
    """(steps a turn, {name: [seconds a step in each turn]}): A B A B ..., all turns together of about `seconds`.

    contestants: name -> turn(steps) -> seconds a step; each has had its first turn. The steps are the same for all, a
    multiple of `multiple`.
    """
    one = sum(turn(multiple) for turn in contestants.values())
    steps = multiple * max(1, round(seconds / repeats / one / multiple))
    found = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, turn in contestants.items():
            found[name].append(turn(steps))
    return steps, found


def quantiles(values: list[float]) -> dict[str, float]:
    """{"median", "q1", "q3"} by linear interpolation."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return {"median": median, "q1": q1, "q3": q3}


def interval(values: list[float], wanted: float = 0.95) -> dict[str, float]:
    """{"median", "low", "high", "coverage"}: an interval of the median from order statistics, of any distribution.

    The k-th smallest and k-th largest value hold it with probability 1 - 2 P(Binomial(n, 1/2) < k); k is the largest
    with the wanted coverage or, if there is none (n < 6), 1: from smallest to largest, with the coverage that has.
    """
    values, n = sorted(values), len(values)
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2 ** n for k in range(1, (n + 1) // 2 + 1)]
    k = max([i for i, c in enumerate(covered, 1) if c >= wanted], default=1)
    return {"median": quantiles(values)["median"], "low": values[k - 1], "high": values[n - k],
            "coverage": covered[k - 1]}


# ------------------------------------------------------------------------------------------------ one work
def measure(work: ModuleType, settings: dict, device: torch.device, *, precision: str = "tf32", seconds: float = 60.0,
            repeats: int = 10, threads: int | None = None, variants: tuple[str, ...] = (),
            say: Callable[[str], None] = lambda line: None) -> dict:
    """What `python -m benchmarks` finds out about one work: the measured part of its record (see records.py).

    precision: of `fit` (the plain loop keeps PyTorch's defaults); variants: names of VARIANTS for this device; one that
    cannot run is left out, and said why; threads: None for all, the case that the work's aims are for.
    Raises BenchmarkError: an unknown variant; and what the work raises.
    """
    changes = {name: VARIANTS[device.type].get(name) for name in variants}
    if unknown := [name for name, change in changes.items() if change is None]:
        raise BenchmarkError(f"no variant {unknown[0]!r} on {device.type}: it has {', '.join(VARIANTS[device.type])}")
    data = work.data(settings)
    makers = {"plain": lambda: Plain(work, settings, data, device)}
    for name, change in {"fit": {}, **changes}.items():
        options = {"precision": precision} | change
        makers[name] = lambda options=options: Fit(work, settings, data, device, **options)
    with _threads(threads), roofs.Company() as company:
        before, multiple = roofs.ceilings(device), 10 if device.type == "cuda" else 1
        contestants, peaks, failed = _entered(makers, device, multiple, say)
        say("in turns: " + ", ".join(contestants))
        turns = {name: one.turn for name, one in contestants.items()}
        steps, times = in_turns(turns, seconds, repeats, multiple)
        ceiling = {name: max(value, before[name]) for name, value in roofs.ceilings(device).items()}
        precisions = {name: changes.get(name, {}).get("precision", precision) for name in contestants}
        del precisions["plain"]
        needed = _needed(work, settings, data, device, set(precisions.values()), contestants["plain"])
    rows = {name: _row(one, times["plain"], times[name], peaks[name], precisions.get(name), needed, ceiling)
            for name, one in contestants.items()}
    found = {"steps_per_turn": steps, "turns": repeats, "rows": rows, "failed": failed, "needed": needed,
             "ceiling": ceiling, "company": company.found, "metric": work.METRIC, "feed": contestants["plain"].feed,
             "feed_ms": contestants["plain"].feeding, "aims": [], "held_by": []}
    if threads is None:
        found["aims"] = judged(work.AIMS, settings, device, rows["fit"])
    if not all(aim["met"] for aim in found["aims"]):
        found["held_by"] = holds(work, settings, data, device, precision)
    return found


def _entered(makers: dict[str, Callable], device: torch.device, steps: int, say) -> tuple[dict, dict, dict]:
    """(contestants, their peak memory in MB, why some variants cannot run), each after a short first turn."""
    contestants, peaks, failed = {}, {}, {}
    makers["fit"]().turn(steps)                                     # libraries load, threads start: nobody's memory
    for name, make in makers.items():
        say(f"first steps: {name}")
        try:
            with roofs.Peak(device) as peak:
                one = make()
                one.turn(steps)
        except (RuntimeError, BookError) as error:
            if name in ("plain", "fit"):
                raise
            failed[name] = " ".join(str(error).split()[:30])
        else:
            contestants[name], peaks[name] = one, peak.mb
    return contestants, peaks, failed


def _row(one: Plain | Fit, plain: list[float], own: list[float], peak: float | None, precision: str | None,
         needed: dict, ceiling: dict) -> dict:
    """One line of the table: rates, ratio to the plain loop, shares of ceilings, memory, the last turn's metric."""
    row = {"seconds_per_step": own, "steps_per_second": quantiles([1 / t for t in own]), "peak_memory_mb": peak,
           "value": one.value}
    if precision:
        row |= {"precision": precision, "ratio": interval([a / b for a, b in zip(plain, own, strict=True)]),
                "achieved": roofs.share(needed[precision], quantiles(own)["median"], ceiling, precision)}
    return row


def _needed(work: ModuleType, settings: dict, data: Tensor, device: torch.device, precisions: set[str],
            plain: Plain) -> dict:
    """Operations and bytes of one eager step: of the plain loop, and of the book's step in each precision."""
    data, found = data.to(device), {"plain": roofs.needs(lambda: plain.loop(1))}
    for precision in sorted(precisions):
        job = work.book(settings, data, device, precision)          # its optimizers get their state in a first step
        batch = job["batches"].batch(0)
        with warnings.catch_warnings(), train.precision(precision, device):
            warnings.simplefilter("ignore")                         # Adam is made to be captured, and here it is not
            job["step"](batch)
            found[precision] = roofs.needs(lambda: job["step"](batch))          # noqa: B023
    return found


def holds(work: ModuleType, settings: dict, data: Tensor, device: torch.device, precision: str,
          steps: int = 5) -> list[dict]:
    """The operators that take most of the book's step, run eagerly: see `roofs.operators`."""
    fit = Fit(work, settings, data, device, precision=precision, graph=False)
    fit.turn(1)
    return roofs.operators(lambda: fit.turn(steps), device)


def judged(aims: list[dict], settings: dict, device: torch.device, row: dict) -> list[dict]:
    """The work's aims for this device and size: [{"what", "wanted", "got", "met"}]; none elsewhere."""
    found = []
    got = {"ratio": row["ratio"]["median"], "share": row["achieved"]["share"],
           "rate": row["steps_per_second"]["median"]}
    for aim in aims:
        if aim["device"] == device.type and all(settings[name] == value for name, value in aim["settings"].items()):
            found += [{"what": what, "wanted": aim[what], "got": got[what], "met": got[what] >= aim[what]}
                      for what in got if what in aim]
    return found
