"""Checkpoints: everything that training changes, in one safetensors file; written atomically, nothing pickled."""
import contextlib
import json
import math
import statistics
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lib import BookError, root, write_atomic

FORMAT = "vaebook-checkpoint-1"


class TrainError(BookError):
    """Training cannot start, go on or resume; the message says what to do."""


def device_of(state: dict) -> torch.device:
    """The device of the first parameter among the modules of a training state; the CPU if there is none."""
    modules = [item for item in state.values() if isinstance(item, torch.nn.Module)]
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ writing
def save_checkpoint(folder: Path, state: dict, meta: dict, best: bool) -> None:
    """Write `latest.safetensors` and, if it is the best so far, `best.safetensors`.

    state: name -> Module, Optimizer or torch.Generator; meta: JSON-able values, `step` among them, that `read_meta`
    returns. Raises TrainError: a weight that is not finite (nothing is written), a disk that is full.
    """
    tensors: dict[str, Tensor] = {}
    tree = {name: _flatten(_state_of(item), name, tensors) for name, item in state.items()}
    bad = next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad:
        raise TrainError(f"{bad} is not finite after step {meta['step']}; {last_good(folder)}; lower the learning rate")
    meta = {"format": FORMAT, "device": device_of(state).type, **meta, "tree": tree}
    content = save(tensors, metadata={"meta": json.dumps(meta)})
    if best:                                              # first: a kill between the two loses neither
        _write(folder, "best", content, meta["step"])
    _write(folder, "latest", content, meta["step"])


def _write(folder: Path, name: str, content: bytes, step: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.safetensors", content)
    except OSError as error:
        raise TrainError(f"cannot write the checkpoint of step {step} to {folder}: {error.strerror}; "
                         f"{last_good(folder)}; free space or choose another folder, then resume") from None


def judge(history: dict[str, list], window: dict[str, list], metric: str) -> float:
    """The metric's mean over the log window under way, else its value at the history's last point; inf: not known."""
    return statistics.fmean(window.get(metric) or history.get(metric, [math.inf])[-1:])


def take_over_best(path: Path, folder: Path, metric: str) -> float:
    """The value that a run in `folder` that resumes from `path` has to get below for a new best checkpoint.

    It is that of the `best.safetensors` beside `path`, which after a kill may be one checkpoint ahead of `path`. A run
    that goes on in another folder takes a copy along. inf: there is none, or not of the training that led to `path`.
    """
    best, meta = path.parent / "best.safetensors", {"history": {}, "window": {}}
    with contextlib.suppress(SafetensorError, OSError, ValueError):
        meta |= read_meta(best)
    if folder.resolve() != path.parent.resolve():
        history = read_meta(path)["history"]
        if "step" not in meta or any(history.get(name, [])[:len(values)] != values
                                     for name, values in meta["history"].items()):
            return math.inf
        _write(folder, "best", best.read_bytes(), meta["step"])
    return judge(meta["history"], meta["window"], metric)


def last_good(folder: Path | None) -> str:
    """Part of a complaint: which checkpoint of a folder there is to go back to."""
    latest = folder / "latest.safetensors" if folder else None
    if not latest or not latest.is_file():
        return "no checkpoint was written before"
    return f"the last good checkpoint is {latest} (step {read_meta(latest)['step']})"


# ------------------------------------------------------------------------------------------------ reading
def made_by(folder: Path) -> list[dict]:
    """The processes that trained the latest checkpoints below a folder: commit, dirty, steps [first, last], seconds."""
    found = []
    for path in sorted(folder.rglob("latest.safetensors")):
        with contextlib.suppress(SafetensorError, ValueError):
            found += read_meta(path).get("made_by", [])
    return found


def read_meta(path: Path) -> dict:
    """What a checkpoint says of itself: step, config, history, window, best, made_by, device."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("meta", "{}"))


def find(resume: str, folder: Path | None) -> Path | None:
    """The checkpoint that `resume` means (see `train.fit_together`); None: afresh. TrainError if it needs a folder."""
    if resume in ("", "auto") and not (resume and folder and (folder / "latest.safetensors").is_file()):
        return None
    if resume in ("auto", "latest", "best"):
        if folder is None:
            raise TrainError(f"resume = {resume!r} needs a run folder")
        return folder / f"{'best' if resume == 'best' else 'latest'}.safetensors"
    path = root() / Path(resume).expanduser()
    return path / "latest.safetensors" if path.is_dir() else path


def load_checkpoint(path: Path, state: dict, config: dict | None = None) -> tuple[int, dict]:
    """Put a checkpoint's contents into `state`; returns (steps done, history). config None: not compared.

    Items of the file that `state` does not name are left out (to sample, the module alone is enough).
    Raises TrainError: no such file, corrupt, another configuration or architecture.
    """
    if not path.is_file():
        raise TrainError(f"no checkpoint at {path}: nothing to resume from")
    try:
        meta = read_meta(path)
        if meta.get("format") != FORMAT:
            raise TrainError(f"{path} is not a checkpoint of this book ({FORMAT})")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainError(f"checkpoint {path} cannot be read ({error}): delete it and start afresh") from None
    if config is not None and meta.get("device", device_of(state).type) != device_of(state).type:
        raise TrainError(f"checkpoint {path} was trained on {meta['device']}, this run is on {device_of(state).type}, "
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


# ------------------------------------------------------------------------------------------------ states as tensors
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
