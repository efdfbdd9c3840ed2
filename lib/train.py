"""The training loop of the whole book: `fit(step, batches, ...)`, and `fit_together` for several models at once.

A step is `step(batch) -> {name: 0-d tensor}`: it runs forward, backward and the optimizer(s), with static shapes, no
host synchronisation, noise from a torch.Generator only, and changes what it changes in place. `fit` owns the rest:
batches, CUDA graphs, history, progress, checkpoints, exact resume, early stopping, the stop on NaN. Only this file and
checkpoint.py know devices, precision and checkpoints.

On CUDA a few steps run eagerly; then `steps_per_replay` steps are captured into a CUDA graph and replayed. A replay
reads the indices of its batches from a buffer that is filled before it and leaves its metrics in another; the host
waits for the device only where metrics are logged or a checkpoint is written.
"""
import contextlib
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib import checkpoint
from lib.batches import Items, Shuffled, Whole  # noqa: F401 (these, made_by and the numerics: for those who import train)
from lib.checkpoint import TrainError, load_checkpoint, made_by  # noqa: F401
from lib.numerics import PRECISIONS, adam, device, generator, precision  # noqa: F401
from lib.runs import git_state, nearest

WARM_UP = 3     # eager steps before a capture: they create the optimizers' state and the libraries' workspaces


# ------------------------------------------------------------------------------------------------ the loop
def fit(step, batches, *, state: dict, config: dict, folder: Path | None = None, title: str = "training", look=None,
        stop=None, best_by: str = "loss", **common) -> dict[str, list]:
    """Run `step` on batches 0 .. steps-1 and return the history {"step": [...], metric: [mean over the log window]}.

    batches: Shuffled, Whole or another object with their `indices` and `at`.
    state: name -> Module, Optimizer or torch.Generator: all that changes while training; it is what a checkpoint holds.
    config: JSON-able values that the weights depend on; a checkpoint with others is refused.
    folder: where `latest.safetensors` and `best.safetensors`, of all checkpoints the first with the lowest `best_by`,
    are kept.
    look: () -> {name: 0-d tensor}, called at every point of the history, which its values join, e.g. a test loss; its
    noise must be in `state`.
    stop: (history) -> bool, asked after every log_every steps, whose point is in; True ends the training there, with a
    checkpoint. It must depend on the history alone: then a resumed run stops at the same step, and stays stopped there.
    best_by: a metric of the step (its mean over the log window that the checkpoint ends or is in) or of `look` (at the
    last point: the checkpoint's own if checkpoint_every is a multiple of log_every). Without a loss there is no best.
    common: `steps` and the options of `fit_together`, of which this is the case of one; it also says what is raised.
    """
    replica = {"step": step, "batches": batches, "state": state, "config": config, "folder": folder, "title": title,
               "look": look, "stop": stop, "best_by": best_by}
    return fit_together([replica], **common)[0]


def fit_together(replicas: list[dict], *, steps: int, log_every: int = 50, checkpoint_every: int = 1000,
                 resume: str = "", numerics: str = "tf32", steps_per_replay: int = 10,
                 graph: bool = True) -> list[dict[str, list]]:
    """Train several models, each exactly as `fit` alone would, and return their histories.

    replicas: for each model the arguments of `fit` up to best_by. On CUDA each has a stream and a graph of its own and
    their replays overlap; on the CPU they take turns. They share neither state nor batches nor folder (the data may be
    one tensor). One that stops leaves the others to go on.
    log_every: steps between two points of the history, the last of which is at the end; checkpoint_every: between
    checkpoints.
    resume: "" afresh, "auto" (from the folder's latest checkpoint if there is one), "latest", "best"; or, for a single
    model, a checkpoint file or run folder, from the checkout's top if relative. A resumed run, also one that goes on
    beyond a shorter run's end, is bit-equal to an uninterrupted one, history included, on the CPU; on CUDA if its
    kernels are deterministic.
    numerics: see `precision`. steps_per_replay: at most so many steps in a CUDA graph: the most that divide log_every
    and checkpoint_every. graph: False runs every step eagerly. Neither changes a result; the CPU knows no graphs.

    Raises TrainError: bad arguments, a best_by that is no metric, a metric or weight that is not finite (named with its
    step and the last good checkpoint), a step that cannot be captured, a checkpoint that is missing, corrupt, longer or
    of another configuration, a disk that is full.
    """
    _check(replicas, steps, log_every, checkpoint_every, steps_per_replay, resume)
    chunk = max(n for n in range(1, steps_per_replay + 1) if log_every % n == checkpoint_every % n == 0)
    runs = [_Training(**replica, steps=steps, resume=resume, chunk=chunk, graph=graph) for replica in replicas]
    with precision(numerics, runs[0].device), _no_advice(), _progress(runs) as bar:
        for run in runs:
            if run.done == run.end > 0 and run.folder and not (run.folder / "latest.safetensors").is_file():
                run.save()                                    # what it began with is all: its own folder says so
        while active := [run for run in runs if run.done < run.end]:
            at = min(run.done for run in active)
            point = min(steps, *(at - at % every + every for every in (log_every, checkpoint_every)))
            behind = [run for run in active if run.done < point]
            ahead = sum(point - run.done for run in behind)
            while waiting := [run for run in behind if run.done < point]:
                for run in waiting:
                    run.advance(point)
            for run in behind:
                run.collect()
                if point % log_every == 0:
                    run.log()
                    run.heed()
                    bar.set_postfix_str(f"{run.names[0]} {run.history[run.names[0]][-1]:.4g}", refresh=False)
                if run.folder and (point % checkpoint_every == 0 or point == run.end):
                    run.save()
            bar.total = sum(run.end for run in runs)
            bar.update(ahead)
        return [run.result() for run in runs]


def _check(replicas: list[dict], steps: int, log_every: int, checkpoint_every: int, steps_per_replay: int,
           resume: str) -> None:
    if steps < 0 or min(log_every, checkpoint_every, steps_per_replay) < 1:
        raise TrainError("steps must be >= 0, log_every, checkpoint_every and steps_per_replay >= 1, got "
                         f"{steps}, {log_every}, {checkpoint_every} and {steps_per_replay}")
    if not replicas:
        raise TrainError("there is nothing to train: give at least one replica")
    if len(replicas) > 1 and resume not in ("", "auto", "latest", "best"):
        raise TrainError(f"resume = {resume!r} is one checkpoint, but {len(replicas)} replicas are to be trained: use "
                         "auto, latest or best")
    owned = [id(item) for one in replicas for item in (one["batches"], *one["state"].values())]
    folders = [one["folder"] for one in replicas if one.get("folder")]
    if len(set(owned)) < len(owned) or len(set(folders)) < len(folders):
        raise TrainError("two replicas share a part of their state, their batches or their folder: give each its own")


class _Training:
    """One model under training: what `fit_together` tells it to do, on a stream of its own if on CUDA."""

    def __init__(self, *, step, batches, state: dict, config: dict, folder: Path | None = None, title: str = "training",
                 look=None, stop=None, best_by: str = "loss", steps: int, resume: str, chunk: int, graph: bool):
        self.look, self.stop, self.best_by, self.end = look, stop, best_by, steps
        self.step, self.batches, self.state, self.folder, self.title = step, batches, state, folder, title
        self.config, self.device, self.chunk = json.loads(json.dumps(config)), checkpoint.device_of(state), chunk
        self.done, self.history, self.best, meta = 0, {"step": []}, math.inf, {}
        if path := checkpoint.find(resume, folder):
            self.done, self.history = load_checkpoint(path, state, self.config)
            meta = checkpoint.read_meta(path)
        if self.done > steps:
            raise TrainError(f"{path} has done {self.done} steps, more than the {steps} asked for: give at least as "
                             "many")
        if path and folder:
            self.best = checkpoint.take_over_best(path, folder, best_by)
        self.window, self.earlier = meta.get("window", {}), meta.get("made_by", [])
        self.began, self.clock = self.done, time.monotonic()
        self.code = git_state() if folder else {}
        self.names, self.rows, self.fresh = [], None, []
        self.graph, self.captures = None, graph and self.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with self._queue():
            index = batches.indices(self.done, 1)
            self.index = index.new_empty(chunk, *index.shape[1:])
        if self.captures and index.device.type != "cuda":
            raise TrainError(f"the data are on the {index.device.type}, the model is on CUDA: move the data there too, "
                             "or pass graph=False")
        self.heed()

    def _queue(self):
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def advance(self, limit: int) -> None:
        """Start the next steps without waiting for them: a whole chunk if it is due and ends by `limit`, else one."""
        whole = self.done >= self.began + WARM_UP and self.done % self.chunk == 0 and limit - self.done >= self.chunk
        count = self.chunk if whole else 1
        with self._queue():
            self.index[:count] = self.batches.indices(self.done, count)
            if whole and self.captures:
                self.graph = self.graph or _capture(lambda: self._run(count), self.stream, self.state)
                self.graph.replay()
            else:
                self._run(count)
            self.fresh.append(self.rows[:count].clone())
        self.done += count

    def _run(self, count: int) -> None:
        """The next `count` steps, from `index` to `rows`: what a CUDA graph captures."""
        for i in range(count):
            row = self._metrics(self.step(self.batches.at(self.index[i])))
            if self.rows is None:
                self.rows = row.new_empty(self.chunk, len(row))
            self.rows[i] = row

    def _metrics(self, found: dict[str, Tensor]) -> Tensor:
        self.names = self.names or list(found)
        return torch.stack([found[name].detach().float() for name in self.names])

    def collect(self) -> None:
        """Wait for the steps started so far and take in their metrics. TrainError if one is not finite."""
        with self._queue():
            rows = torch.cat(self.fresh).double().cpu()
        self.fresh.clear()
        self._refuse_nan(self.names, rows.tolist(), self.done - len(rows) + 1)
        for name, values in zip(self.names, rows.T.tolist(), strict=True):
            self.window.setdefault(name, []).extend(values)

    def _refuse_nan(self, names: list[str], rows: list[list[float]], first: int) -> None:
        for step, row in enumerate(rows, first):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    good = checkpoint.last_good(self.folder)
                    raise TrainError(f"{self.title}: {name} became {value} at step {step}; {good}; lower the learning "
                                     "rate or look at the data")

    def log(self) -> None:
        """Close the log window: its means, and what `look` sees now, become a point of the history."""
        if self.look:
            with self._queue():
                seen = self.look()
                values = torch.stack(list(seen.values())).double().tolist()
            self._refuse_nan(list(seen), [values], self.done)
            self.window |= {name: [value] for name, value in zip(seen, values, strict=True)}
        if self.best_by not in self.window and self.best_by != "loss":
            raise TrainError(f"{self.title} has no metric {self.best_by!r} to choose the best checkpoint by"
                             f"{nearest(self.best_by, self.window)}")
        self.history["step"].append(self.done)
        for name, values in self.window.items():
            self.history.setdefault(name, []).append(statistics.fmean(values))
        self.window = {}

    def heed(self) -> None:
        """Let the training end here if this is a point of the history and `stop` says so."""
        if self.stop and self.done in self.history["step"][-1:] and self.stop(self.history):
            self.end = self.done

    def save(self) -> None:
        """Write a checkpoint; the window under way is part of it, so that a resumed run logs the same points."""
        value = checkpoint.judge(self.history, self.window, self.best_by)
        best, self.best = value < self.best, min(value, self.best)
        own = self.code | {"steps": [self.began, self.done], "seconds": round(time.monotonic() - self.clock, 1)}
        meta = {"step": self.done, "config": self.config, "history": self.history, "window": self.window,
                "best": self.best, "made_by": [*self.earlier, own]}
        with self._queue():
            checkpoint.save_checkpoint(self.folder, self.state, meta, best)

    def result(self) -> dict[str, list]:
        """The history, ended by a point for the steps since the last one."""
        if self.window:
            self.log()
        return self.history


# ------------------------------------------------------------------------------------------------ CUDA graphs
def _capture(steps, stream, state: dict) -> "torch.cuda.CUDAGraph":
    """What `steps()` does as a CUDA graph on `stream`: recorded, not done.

    TrainError if it cannot be recorded, or if a replay would not repeat it: it puts a new tensor in place of a weight,
    buffer or moment, where a replay would read the old one again.
    """
    graph = torch.cuda.CUDAGraph()
    _register_generators(graph, state)
    before = _addresses(state)
    try:
        with torch.cuda.graph(graph, stream=stream):
            steps()
    except RuntimeError as error:                             # __context__: it may be but the end of a broken capture
        said = " ".join(str(error.__context__ or error).split()[:40])
        raise TrainError(f"the step cannot be captured in a CUDA graph ({said}): keep the CPU out of it, or pass "
                         "graph=False") from None
    moved = next((name for name, address in _addresses(state).items() if before.get(name) != address), None)
    if moved:
        raise TrainError(f"the step replaces {moved}, which a CUDA graph cannot repeat: change it in place (copy_, "
                         "lerp_), or pass graph=False")
    return graph


def _register_generators(graph, state: dict) -> None:
    """Let replays advance the generators as eager steps do. Newer versions of torch see to this themselves."""
    if not hasattr(graph, "register_generator_state"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                       # it is deprecated where it does nothing
        for item in state.values():
            if isinstance(item, torch.Generator) and item.device.type == "cuda":
                graph.register_generator_state(item)


def _addresses(state: dict) -> dict[str, int]:
    """Where the tensors of modules and optimizers lie in memory, by name."""
    found = {}
    for name, item in state.items():
        if isinstance(item, torch.nn.Module):
            found |= {f"{name}/{key}": t.data_ptr() for key, t in [*item.named_parameters(), *item.named_buffers()]}
        elif isinstance(item, torch.optim.Optimizer):
            found |= {f"{name}/{i}/{key}": t.data_ptr() for i, moments in enumerate(item.state.values())
                      for key, t in moments.items() if isinstance(t, Tensor)}
    return found


@contextlib.contextmanager
def _no_advice():
    """Adam on CUDA is made to be captured and warns when its first steps are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        yield


# ------------------------------------------------------------------------------------------------ progress
def interactive() -> bool:
    """True at a terminal or in a notebook that a person runs (papermill, nbval and nbconvert do not count)."""
    if "ipykernel" not in sys.modules:
        return sys.stderr.isatty()
    from IPython import get_ipython
    shell = get_ipython()
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def _progress(runs: list[_Training]):
    title = " + ".join(dict.fromkeys(run.title for run in runs)) + (f" ({len(runs)} replicas)" if len(runs) > 1 else "")
    return tqdm(total=sum(run.end for run in runs), initial=sum(run.done for run in runs), desc=title, unit="step",
                leave=False, disable=not interactive())
