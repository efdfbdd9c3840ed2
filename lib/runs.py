"""A run: its parameters, its folder, its results.json, its provenance; and many runs read as one table.

In a notebook: `run = runs.start("gmm", globals())` after the parameters cell, `run.save(metrics)` at the end.
Working runs live in runs/<experiment>/<run>/ (not committed); recorded ones in book/results/<experiment>/<run>/.
"""
import ast
import contextlib
import datetime
import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lib import BookError, intervals, root, write_atomic
from lib.provenance import device_info, git_state, peak_memory_mb, versions

SCHEMA = 1
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
HOUSEKEEPING = ("resume", "device", "replicas", "query", "document")    # from what, where, beside what a run ran, and
                                                  # what was looked at in it: not part of its name


class RunError(BookError):
    """A run cannot start or be saved; the message says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------------ parameters
@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""
    name: str
    type: str
    default: object
    help: str


def notebook_path(experiment: str) -> Path:
    """notebooks/<experiment>.ipynb; RunError with the nearest name if there is none."""
    path = root() / "notebooks" / f"{experiment}.ipynb"
    if not path.is_file():
        raise RunError(f"no notebook {experiment!r}{nearest(experiment, notebooks())}")
    return path


def notebooks() -> list[str]:
    """Names of all notebooks that have a parameters cell."""
    return sorted(path.stem for path in (root() / "notebooks").glob("*.ipynb") if _parameters_source(path) is not None)


def _parameters_source(path: Path) -> str | None:
    try:
        return _parameters_cell(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} is not a notebook: {error}") from None


@functools.lru_cache                                      # a sweep asks for each of its runs
def _parameters_cell(path: Path, changed: int) -> str | None:
    cells = json.loads(path.read_text())["cells"]
    return next(("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])), None)


def parameters(experiment: str) -> dict[str, Parameter]:
    """The parameters that a notebook declares, in order. RunError if a line is not `name: type = literal  # help`."""
    source = _parameters_source(notebook_path(experiment))
    if source is None:
        raise RunError(f"notebook {experiment!r} has no cell tagged 'parameters'")
    declared, line = {}, 0
    try:
        nodes = ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for node in nodes:
            line = node.lineno
            name, kind = node.target.id, ast.unparse(node.annotation)          # AttributeError: not `name: type = …`
            if kind not in TYPES or name in declared:
                raise ValueError
            declared[name] = Parameter(name, kind, ast.literal_eval(node.value), comments.get(line, ""))
    except (SyntaxError, AttributeError, ValueError) as error:
        raise RunError(f"{experiment}, parameters cell, line {getattr(error, 'lineno', None) or line}: write once "
                       f"`name: type = value  # help` with a type of {', '.join(TYPES)} and a plain value") from None
    return declared


def presets(experiment: str) -> dict[str, dict]:
    """The notebook's presets of notebooks/presets.yml: {preset: {parameter: value}}."""
    try:
        known = presets_file().get(experiment) or {}
        return {preset: dict(values or {}) for preset, values in known.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise RunError(f"notebooks/presets.yml cannot be read: {' '.join(str(error).split())}") from None


def presets_file() -> dict:
    """notebooks/presets.yml as it stands: notebooks with their presets, and `sweeps`. OSError, YAMLError."""
    path = root() / "notebooks" / "presets.yml"
    return _yaml(path, path.stat().st_mtime_ns)


@functools.lru_cache                                      # a sweep asks for each of its runs
def _yaml(path: Path, changed: int) -> dict:
    return yaml.safe_load(path.read_text()) or {}


def check(experiment: str, values: dict) -> dict:
    """Complete values with the defaults. RunError on an unknown name (the nearest is named) or a wrong type."""
    declared = parameters(experiment)
    for name in values:
        if name not in declared:
            raise RunError(f"{experiment} has no parameter {name!r}{nearest(name, declared)}")
    return {p.name: _typed(p, values.get(p.name, p.default)) for p in declared.values()}


def _typed(parameter: Parameter, value):
    if parameter.type == "float" and type(value) is int:
        value = float(value)
    if type(value) is not TYPES[parameter.type] or (parameter.type == "float" and not math.isfinite(value)):
        raise RunError(f"parameter {parameter.name} must be {parameter.type}, got {value!r} ({type(value).__name__}); "
                       f"with papermill pass it as YAML: -y '{parameter.name}: {json.dumps(parameter.default)}'")
    return value


def parse(experiment: str, name: str, text: str):
    """The value of `--set name=text` by the declared type. RunError if it is none."""
    declared = parameters(experiment)
    if name not in declared:
        raise RunError(f"{experiment} has no parameter {name!r}{nearest(name, declared)}")
    kind = declared[name].type
    try:
        if kind == "str":
            return text
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        value = yaml.safe_load(text) if kind == "list" else TYPES[kind](text)
        return _typed(declared[name], value)
    except (KeyError, ValueError, yaml.YAMLError, RunError):
        raise RunError(f"parameter {name} of {experiment} must be {kind}, got {text!r}") from None


def nearest(name: str, known) -> str:
    """The end of a complaint about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(known) or 'none'}"


def reduced(experiment: str, values: dict) -> list[str]:
    """What differs from the `paper` preset, e.g. ["steps 300 instead of 10000"]; [] is the published size."""
    paper = presets(experiment).get("paper", {})
    return [f"{name} {values[name]} instead of {full}" for name, full in paper.items()
            if name in values and values[name] != full and name not in HOUSEKEEPING]


def shortfall(reductions: Sequence[str]) -> tuple[int, float]:
    """How far reductions ("steps 300 instead of 10000") are from the published size, to be sorted by: how many there
    are, then the sum of |log(had / published)| of those that are ratios.
    """
    ratios = (re.fullmatch(r".* (\d\S*) instead of (\d\S*)", text.replace(",", "")) for text in reductions)
    sizes = [tuple(map(float, match.groups())) for match in ratios if match]
    return len(reductions), sum(abs(math.log(had / full)) for had, full in sizes if had > 0 and full > 0)


def name_of(experiment: str, preset: str, values: dict) -> str:
    """The run's name: its preset and what differs from it, e.g. `cpu-model=ae-seed=2`, or `default`."""
    base = {p.name: p.default for p in parameters(experiment).values()} | presets(experiment).get(preset, {})
    changed = [f"{name}={value}" for name, value in values.items() if value != base[name] and name not in HOUSEKEEPING]
    name = "-".join(([preset] if preset else []) + changed) or "default"
    name = "".join(c if c.isalnum() or c in "-_=.," else "_" for c in name)
    return name if len(name) <= 120 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def command_of(experiment: str, preset: str, values: dict) -> str:
    """The command line that makes this run again."""
    base = {p.name: p.default for p in parameters(experiment).values()} | presets(experiment).get(preset, {})
    words = ["--preset", preset] if preset else []
    for name, value in values.items():
        if value != base[name] and name not in HOUSEKEEPING:
            text = value if isinstance(value, str) else json.dumps(value)
            words += ["--seed", text] if name == "seed" else ["--set", f"{name}={text}"]
    return shlex.join(["python", "-m", "lib", "run", experiment, *words])


# ------------------------------------------------------------------------------------------------ one run
@dataclass
class Run:
    """A run under way: `folder` takes checkpoints and pictures, `save` ends it."""
    experiment: str
    name: str
    preset: str
    parameters: dict
    folder: Path
    git: dict
    started: float = field(default_factory=time.time)
    figures: list[str] = field(default_factory=list)
    added: bool = False                                  # by the `replicas` of another run, which alone is glued

    @property
    def changed(self) -> list[str]:
        """Names of the parameters that differ from the notebook's defaults."""
        return [p.name for p in parameters(self.experiment).values() if self.parameters[p.name] != p.default]

    def replicas(self, n: int) -> list["Run"]:
        """This run and those of the n - 1 next seeds, to be trained together; each is ended by its own `save`.

        See `replicas.added` for where they are and what is left out. Raises RunError as it does.
        """
        from lib import replicas
        return [self, *replicas.added(self, n)]

    def save_figure(self, fig, name: str) -> None:
        """Write a matplotlib figure as <name>.png (110 dpi) into the run's folder."""
        fig.savefig(self.folder / f"{name}.png", dpi=110)
        if f"{name}.png" not in self.figures:            # a cell may run again
            self.figures.append(f"{name}.png")

    def save(self, metrics: dict, dataset=None, history: dict | None = None, **more) -> dict:
        """Write results.json (atomically, last) and glue each metric's value under its name; returns the record.

        metrics: name -> {"value", "se", "n", "unit"} (evaluate.estimate, evaluate.exact); dataset: data.Dataset; more:
        whatever else the numbers depend on, JSON-able, e.g. the recipe of a classifier.
        Raises RunError if a metric is not such a thing or not finite, or the folder cannot be written.
        """
        for name, metric in metrics.items():
            whole = isinstance(metric, dict) and set(metric) == {"value", "se", "n", "unit"}
            if not whole or not math.isfinite(metric["value"]):
                raise RunError(f"metric {name} is {metric}: it needs a finite value, se, n and unit")
        record = {
            "schema": SCHEMA, "experiment": self.experiment, "run": self.name, "preset": self.preset,
            "parameters": self.parameters,
            "reduced": [*reduced(self.experiment, self.parameters), *getattr(dataset, "lacks", ())], "metrics": metrics,
            "seed": self.parameters.get("seed"),
            "dataset": _dataset(dataset) if dataset else None,
            "command": command_of(self.experiment, self.preset, self.parameters), "git": self.git,
            "made_by": _made_by(self.folder),
            "versions": versions(), "device": device_info(self.parameters.get("device", "auto")),
            "wall_time_s": round(time.time() - self.started, 1), "peak_memory_mb": peak_memory_mb(),
            "figures": self.figures,
            "date": datetime.datetime.fromtimestamp(self.started, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "history": history or {}, **more}
        pending = os.environ.get("VAEBOOK_RUN") and not self.added             # `lib run` renames it last
        file = "results.json.pending" if pending else "results.json"
        try:
            write_atomic(self.folder / file, as_text(record).encode())
        except (TypeError, ValueError) as error:
            raise RunError(f"results of {self.name} hold a value that is no plain, finite number: {error}") from None
        except OSError as error:
            raise RunError(f"cannot write {self.folder / file}: {error.strerror}") from None
        _glue({} if self.added else {name: metric["value"] for name, metric in metrics.items()})
        return record


def _dataset(dataset) -> dict:
    source = getattr(dataset, "source", "")                      # what was read, of data that come in several forms
    return {"name": dataset.name, "sha256": dataset.sha256} | ({"source": source} if source else {})


def _made_by(folder: Path) -> list[dict]:
    if not any(folder.rglob("latest.safetensors")):
        return []
    from lib import train
    return train.made_by(folder)


def as_text(record: dict) -> str:
    """A record as strict JSON, a list of plain values on one line. ValueError if a number is not finite."""
    text = json.dumps(record, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda plain: re.sub(r"\n\s*", " ", plain[0]), text) + "\n"


def start(experiment: str, namespace: dict, preset: str | None = None) -> Run:
    """Begin the run of a notebook: check its parameters, make its folder, start the clock.

    namespace: the notebook's globals(). The preset and the folder come from `python -m lib run` (environment) or, when
    papermill or a person runs the notebook, from the parameters. Raises RunError: an unknown or ill-typed parameter
    (also one injected by papermill under a misspelt name), or a folder that cannot be written.
    """
    declared = parameters(experiment)
    values = check(experiment, {name: namespace[name] for name in declared if name in namespace} | _injected(namespace))
    preset = os.environ.get("VAEBOOK_PRESET", "") if preset is None else preset
    name = name_of(experiment, preset, values)
    folder = Path(os.environ.get("VAEBOOK_RUN") or root() / "runs" / experiment / name)
    make_folder(folder)
    if "VAEBOOK_RUN" not in os.environ:                       # what it holds tells a complete run: not this one yet
        (folder / "results.json").unlink(missing_ok=True)
    return Run(experiment, name, preset, values, folder, git_state())


def _injected(namespace: dict) -> dict:
    """What papermill injected (its cell begins with `# Parameters`): also names that the notebook does not declare."""
    names = set()
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            with contextlib.suppress(SyntaxError):              # a person's own cell, with a magic command
                names |= {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
                          for target in node.targets if isinstance(target, ast.Name)}
    return {name: namespace[name] for name in names if name in namespace and not name.startswith("papermill")}


def make_folder(folder: Path) -> None:
    """Create a run's folder and prove that it can be written. RunError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)          # another process may do the same
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error.strerror}; --out chooses another") from None


def _glue(values: dict) -> None:
    if "ipykernel" not in sys.modules:      # myst_nb is slow to import
        return
    try:
        from myst_nb import glue
    except ImportError:                     # a bare machine that only computes
        return
    for name, value in values.items():
        glue(name, float(value), display=False)


# ------------------------------------------------------------------------------------------------ many runs
def from_json(path: Path):
    """A JSON file's content. RunError if it is missing or not JSON (a NaN is none)."""
    def refuse(constant):
        raise ValueError(f"{constant} is no number")
    try:
        return json.loads(path.read_text(), parse_constant=refuse)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run did not finish") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def read(path: Path) -> dict:
    """A run's record. RunError if it is missing, not JSON or not as lib/results.schema.json says."""
    from lib import integrity
    record = from_json(path)
    integrity.validate(record, path)
    return record


def records(experiment: str | None = None, folder: Path | None = None) -> list[dict]:
    """Every recorded run (book/results, or another folder), with "path" relative to that folder, sorted by path.

    RunError if a file of the book's own records is not the one that was recorded, by its checksum.
    """
    from lib import integrity
    if folder is None:
        folder = integrity.results()
        integrity.check(folder, experiment or "")
    paths = sorted(path for path in folder.glob(f"{experiment or '*'}/*/results.json")
                   if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [read(path) | {"path": str(path.parent.relative_to(folder))} for path in paths]


def known(record: dict) -> dict:
    """What a record can be asked by: its parameters and `dataset`, its data's name (of a chain, its first run's)."""
    own = record.get("dataset")
    return ({"dataset": own["name"]} if own else {}) | record["parameters"]


def table(found: list[dict], metrics: list[str], by: list[str]):
    """Runs as a pandas DataFrame: mean and 95 % interval over seeds of each metric, a row for each setting.

    Runs are of one setting if they differ in the seed (and HOUSEKEEPING) only; of a repeated seed the newest counts.
    Columns: by (parameters, "–" where a run is too old to have one), seeds, size, metric -> "m ± h", h the half-width
    over the seeds (lib/intervals.py). With a single seed h is over the run's own items, and "(n=… items)" says so;
    "(n=…)" tells a metric that only n of the seeds have.
    """
    import pandas as pd
    pd.set_option("display.max_colwidth", None)               # a notebook shows how a run is reduced, whole
    rows = {}
    for record in sorted(found, key=lambda record: record.get("date", "")):
        setting = {name: value for name, value in record["parameters"].items() if name not in ("seed", *HOUSEKEEPING)}
        rows.setdefault(json.dumps(setting), {})[record["parameters"].get("seed")] = record
    out = []
    for seeds in rows.values():
        group = list(seeds.values())
        row = {name: str(group[0]["parameters"].get(name, "–")) for name in by}
        row |= {"seeds": len(group), "size": "; ".join(group[0]["reduced"]) or "full"}
        for name in metrics:
            row[name] = _cell([record["metrics"][name] for record in group if name in record["metrics"]], len(group))
        out.append(row)
    return pd.DataFrame(out, columns=[*by, "seeds", "size", *metrics])


def metrics_table(metrics: dict[str, dict]):
    """One run's metrics as a pandas DataFrame: metric, mean ± half-width of its 95 % interval over n items, n, unit."""
    import pandas as pd
    lines = [(name, intervals.of_metric(own).text(), own["n"], own["unit"]) for name, own in metrics.items()]
    return pd.DataFrame(lines, columns=["metric", "value", "n", "unit"]).set_index("metric")


def _cell(values: list[dict], seeds: int) -> str:
    """One metric of the runs of a setting with so many seeds."""
    if len(values) > 1:
        few = f" (n={len(values)})" if len(values) < seeds else ""
        return intervals.of_values([metric["value"] for metric in values]).text() + few
    if not values:
        return "–"
    own = intervals.of_metric(values[0])
    return own.text() + (f" (n={own.n} items)" if own.half else "")


def seconds(record: dict) -> float:
    """How long a run took: its wall time or, where that is of a later measuring only, what `made_by` says it trained.

    Of a chain of runs its last stage only.
    """
    return max(record["wall_time_s"], sum(one["seconds"] for one in record.get("made_by", [])))
