"""The training loop of the whole book: `fit(step, batches, ...)`.

A step is `step(batch) -> {name: 0-d tensor}`: it runs forward, backward and the optimizer(s), with static shapes, no
host synchronisation and noise from a torch.Generator only. `fit` owns the rest: batches, history, progress,
checkpoints, exact resume, the stop on NaN. Only this file knows devices, precision and checkpoints.
"""
import contextlib
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from lib import BookError, root, write_atomic
from lib.runs import git_state

FORMAT = "vaebook-checkpoint-1"
PRECISIONS = ("fp32", "tf32", "bf16")


class TrainError(BookError):
    """Training cannot start, go on or resume; the message says what to do."""


# ------------------------------------------------------------------------------------------------ device and noise
def device(name: str = "auto") -> torch.device:
    """`auto`: CUDA if there is one, else the CPU. TrainError if the device asked for is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise TrainError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("device 'cuda' was asked for but this machine has no CUDA GPU: use auto or cpu")
    return torch.device(name)


def generator(seed: int, device: torch.device | str = "cpu", use: str = "noise") -> torch.Generator:
    """A source of randomness on the device, independent for every seed and use ("weights", "noise", ...).

    Seed and use are hashed to 32 bits: the CPU generator ignores higher ones. Give the noise to `fit` in `state`.
    """
    digest = hashlib.sha256(f"{seed}/{use}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


@contextlib.contextmanager
def precision(name: str, device: torch.device):
    """Numerics of the steps: fp32; tf32 (matrix products on CUDA, no effect on the CPU); bf16 (autocast)."""
    if name not in PRECISIONS:
        raise TrainError(f"unknown precision {name!r}: use one of {', '.join(PRECISIONS)}")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ------------------------------------------------------------------------------------------------ batches
class Shuffled:
    """Batches of `size` drawn without replacement, reshuffled every epoch, the incomplete last one dropped.

    `batch(t)` is a pure function of (seed, t), so a resumed run needs no state. data [N, ...] stays where it is.
    """

    def __init__(self, data: Tensor, size: int, seed: int):
        if not 1 <= size <= len(data):
            raise TrainError(f"batch size must be between 1 and the {len(data)} training items, got {size}")
        self.data, self.size, self.seed = data, size, seed
        self.per_epoch = len(data) // size
        self._epoch, self._order = -1, None

    def batch(self, t: int) -> Tensor:
        """Step t's batch [size, ...]."""
        epoch, i = divmod(t, self.per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self.data), generator=generator(self.seed, use=f"epoch {epoch}"))
            self._epoch, self._order = epoch, order.to(self.data.device)
        return self.data[self._order[i * self.size:(i + 1) * self.size]]


class Whole:
    """Every batch is all of the data (full-batch training)."""

    def __init__(self, data: Tensor):
        self.data = data

    def batch(self, t: int) -> Tensor:
        """The whole data, whatever t."""
        return self.data


# ------------------------------------------------------------------------------------------------ the loop
def fit(step, batches, *, steps: int, state: dict, config: dict, folder: Path | None = None, log_every: int = 50,
        checkpoint_every: int = 1000, resume: str = "", numerics: str = "tf32",
        title: str = "training") -> dict[str, list]:
    """Run `step` on batches 0 .. steps-1 and return the history {"step": [...], metric: [mean over the log window]}.

    state: name -> Module, Optimizer or torch.Generator: all that changes while training; it is what a checkpoint holds.
    config: JSON-able values that the weights depend on; a checkpoint with others is refused.
    folder: where `latest.safetensors` and `best.safetensors` (of all checkpoints the lowest last logged loss) are kept.
    folder is also where `resume` looks: "" afresh, "auto" (latest if there is one), "latest", "best"; or it is a
    checkpoint file or run folder, from the checkout's top if relative. A resumed run is bit-equal to an uninterrupted
    one on the CPU; one that goes on beyond a shorter run's end keeps the history point that was logged there.

    Raises TrainError: bad arguments, a metric or weight that is not finite (named with its step and the last good
    checkpoint), a checkpoint that is missing, corrupt, longer or of another configuration, a disk that is full.
    """
    if steps < 0 or log_every < 1 or checkpoint_every < 1:
        raise TrainError("steps must be >= 0, log_every and checkpoint_every >= 1, "
                         f"got {steps}, {log_every} and {checkpoint_every}")
    config = json.loads(json.dumps(config))
    done, history, best, earlier, began = 0, {"step": []}, math.inf, [], time.monotonic()
    if path := _find(resume, folder):
        done, history = load_checkpoint(path, state, config)
        best, earlier = _meta(path).get("best", math.inf), _meta(path).get("made_by", [])
    if done > steps:
        raise TrainError(f"{path} has done {done} steps, more than the {steps} asked for: give at least as many")
    code = git_state() if folder else {}
    window, names = [], None
    with precision(numerics, _device_of(state)), _progress(steps, done, title) as bar:
        for t in range(done, steps):
            metrics = step(batches.batch(t))
            names = names or list(metrics)
            window.append(torch.stack([metrics[name].detach().float() for name in names]))
            last = t + 1 == steps
            checkpoint = folder is not None and (last or (t + 1) % checkpoint_every == 0)
            if last or checkpoint or (t + 1) % log_every == 0:
                _log(history, names, torch.stack(window).double().cpu(), t + 1, folder)
                bar.set_postfix_str(f"{names[0]} {history[names[0]][-1]:.4g}", refresh=False)
                bar.update(len(window))
                window.clear()
            if checkpoint:
                own = code | {"steps": [done, t + 1], "seconds": round(time.monotonic() - began, 1)}
                best = _save_checkpoint(folder, state, t + 1, history, config, best, [*earlier, own])
    return history


def _log(history: dict, names: list[str], window: Tensor, step: int, folder: Path | None) -> None:
    """Append the window's means; window [steps, metrics] float64."""
    finite = window.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise TrainError(f"{names[column]} became {window[row, column].item()} at step {step - len(window) + row + 1}; "
                         + _last_good(folder) + "; lower the learning rate or look at the data")
    history["step"].append(step)
    for name, mean in zip(names, window.mean(0).tolist(), strict=True):
        history.setdefault(name, []).append(mean)


def _last_good(folder: Path | None) -> str:
    latest = folder / "latest.safetensors" if folder else None
    if not latest or not latest.is_file():
        return "no checkpoint was written before"
    return f"the last good checkpoint is {latest} (step {_meta(latest)['step']})"


def _device_of(state: dict) -> torch.device:
    modules = [item for item in state.values() if isinstance(item, torch.nn.Module)]
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


def interactive() -> bool:
    """True at a terminal or in a notebook that a person runs (papermill, nbval and nbconvert do not count)."""
    if "ipykernel" not in sys.modules:
        return sys.stderr.isatty()
    from IPython import get_ipython
    shell = get_ipython()
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def _progress(steps: int, done: int, title: str):
    return tqdm(total=steps, initial=min(done, steps), desc=title, unit="step", leave=False, disable=not interactive())


# ------------------------------------------------------------------------------------------------ checkpoints
def _save_checkpoint(folder: Path, state: dict, step: int, history: dict, config: dict, best: float,
                     made_by: list[dict]) -> float:
    """Write latest and, if its last logged loss is below `best`, best; returns the lowest such loss so far."""
    tensors: dict[str, Tensor] = {}
    tree = {name: _flatten(_state_of(item), name, tensors) for name, item in state.items()}
    bad = next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad:
        raise TrainError(f"{bad} is not finite after step {step}; {_last_good(folder)}; lower the learning rate")
    meta = {"format": FORMAT, "step": step, "device": _device_of(state).type, "config": config, "history": history,
            "best": min(best, history.get("loss", [math.inf])[-1]), "made_by": made_by, "tree": tree}
    content = save(tensors, metadata={"meta": json.dumps(meta)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if meta["best"] < best:                           # first: a kill between the two loses neither
            write_atomic(folder / "best.safetensors", content)
        write_atomic(folder / "latest.safetensors", content)
    except OSError as error:
        raise TrainError(f"cannot write the checkpoint of step {step} to {folder}: {error.strerror}; "
                         f"{_last_good(folder)}; free space or choose another folder, then resume") from None
    return meta["best"]


def made_by(folder: Path) -> list[dict]:
    """The processes that trained the latest checkpoints below a folder: commit, dirty, steps [first, last], seconds."""
    found = []
    for path in sorted(folder.rglob("latest.safetensors")):
        with contextlib.suppress(SafetensorError, ValueError):
            found += _meta(path).get("made_by", [])
    return found


def _meta(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("meta", "{}"))


def load_checkpoint(path: Path, state: dict, config: dict | None = None) -> tuple[int, dict]:
    """Put a checkpoint's contents into `state`; returns (steps done, history). config None: not compared.

    Items of the file that `state` does not name are left out (to sample, the module alone is enough).
    Raises TrainError: no such file, corrupt, another configuration or architecture.
    """
    if not path.is_file():
        raise TrainError(f"no checkpoint at {path}: nothing to resume from")
    try:
        meta = _meta(path)
        if meta.get("format") != FORMAT:
            raise TrainError(f"{path} is not a checkpoint of this book ({FORMAT})")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainError(f"checkpoint {path} cannot be read ({error}): delete it and start afresh") from None
    if config is not None and meta.get("device", _device_of(state).type) != _device_of(state).type:
        raise TrainError(f"checkpoint {path} was trained on {meta['device']}, this run is on {_device_of(state).type}, "
                         "whose noise is another: go on there or start afresh")
    for key in sorted(config or {}):
        if meta["config"].get(key) != config[key]:
            raise TrainError(f"checkpoint {path} was trained with {key} = {meta['config'].get(key)!r}, this run has "
                             f"{config[key]!r}: resume with the same parameters or start afresh")
    try:
        for name, item in state.items():
            _restore(item, _unflatten(meta["tree"][name], tensors))
    except (KeyError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()[:40])
        raise TrainError(f"checkpoint {path} does not fit this model: {said}") from None
    return meta["step"], meta["history"]


def _find(resume: str, folder: Path | None) -> Path | None:
    if resume in ("", "auto") and not (resume and folder and (folder / "latest.safetensors").is_file()):
        return None
    if resume in ("auto", "latest", "best"):
        if folder is None:
            raise TrainError(f"resume = {resume!r} needs a run folder")
        return folder / f"{'best' if resume == 'best' else 'latest'}.safetensors"
    path = root() / Path(resume).expanduser()
    return path / "latest.safetensors" if path.is_dir() else path


def _state_of(item):
    return item.get_state() if isinstance(item, torch.Generator) else item.state_dict()


def _restore(item, value) -> None:
    if isinstance(item, torch.Generator):
        return item.set_state(value)
    item.load_state_dict(value)
    if isinstance(item, torch.optim.Optimizer):          # the moments take their parameter's memory format again
        for parameter, moments in item.state.items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _flatten(tree, path: str, tensors: dict):
    """Nested dicts and lists -> the same JSON-able, keys keeping their type; the tensors go to `tensors` by path."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"dict": [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]}
    return {"value": tree}


def _unflatten(tree, tensors: dict):
    (kind, value), = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in value}
    if kind == "list":
        return [_unflatten(item, tensors) for item in value]
    return value
