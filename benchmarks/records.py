"""Records of benchmarks: one JSON file for each device and work, and what is read out of them.

Working ones lie in runs/benchmarks/, recorded ones in book/results/benchmarks/, each as <device>-<work>.json.
"""
import datetime
import math
import re
from pathlib import Path

import torch

from benchmarks.harness import BenchmarkError
from lib import integrity, runs, write_atomic

SCHEMA = 1
NEEDED = {"schema", "work", "settings", "options", "command", "git", "versions", "device", "numerics", "date",
          "steps_per_turn", "turns", "rows", "failed", "needed", "ceiling", "company", "metric", "feed", "feed_ms",
          "aims", "held_by"}
COLUMNS = ("device", "work", "batch", "plain [steps/s]", "fit [steps/s]", "fit / plain", "share of the ceiling",
           "plain [MB]", "fit [MB]", "aim", "others [cores]")
BUSY = 0.1                     # cores' worth of other processes' work from which a measurement is called disturbed


# ------------------------------------------------------------------------------------------------ writing
def make(work: str, settings: dict, options: dict, command: str, where: torch.device, git: dict, found: dict) -> dict:
    """A record from what `harness.measure` found; options: those of the measurement; git: `runs.git_state()` before."""
    flags = {"matmul_tf32": torch.backends.cuda.matmul.allow_tf32, "cudnn_tf32": torch.backends.cudnn.allow_tf32,
             "cudnn_benchmark": torch.backends.cudnn.benchmark}     # what the plain loop ran with
    info = runs.device_info(where.type) | ({"threads": options["threads"]} if options["threads"] else {})
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"schema": SCHEMA, "work": work, "settings": settings, "options": options, "command": command, "git": git,
            "versions": runs.versions(), "device": info, "numerics": flags, "date": now, **found}


def name_of(record: dict) -> str:
    """The file's name: <device>-<work>.json, the device's name in small letters, digits and hyphens."""
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    return f"{slug}-{record['work']}.json"


def write(folder: Path, record: dict) -> Path:
    """Write a record into a folder, in place of an older one of its device and work; returns its path.

    Raises BenchmarkError: a value that is not finite, a folder that cannot be written.
    """
    path = folder / name_of(record)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, runs.as_text(record).encode())
    except ValueError as error:
        raise BenchmarkError(f"the record of {record['work']} holds a value that is no plain, finite number: {error}") \
            from None
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}") from None
    return path


def keep(record: dict) -> Path:
    """Write a record into the book, and the line of its checksum; returns its path. Raises as `write` does."""
    with integrity.renewing(integrity.results(), f"benchmarks/{name_of(record)}") as path:
        return write(path.parent, record)


def check_committed(git: dict) -> None:
    """Raise BenchmarkError unless the state of the checkout, as `runs.git_state` says it, is a clean commit."""
    if git["dirty"] or git["commit"] == "unknown":
        raise BenchmarkError("there are changes that are not committed: commit them, then record")


# ------------------------------------------------------------------------------------------------ reading
def read(path: Path) -> dict:
    """One record. RunError if it is not JSON or not of this schema."""
    record = runs.from_json(path)
    missing = NEEDED - set(record if isinstance(record, dict) else ())
    if missing or record["schema"] != SCHEMA:
        lacks = ", ".join(sorted(missing)) or "nothing"
        raise runs.RunError(f"{path} is not a benchmark of schema {SCHEMA} (missing: {lacks})")
    return record


def recorded(folder: Path | None = None) -> list[dict]:
    """All records of book/results/benchmarks, or of another folder: CUDA first, then by device and work.

    RunError if one of the book's own is not the one that was recorded, by its checksum.
    """
    if folder is None:
        integrity.check(integrity.results(), "benchmarks")
        folder = integrity.results() / "benchmarks"
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: (record["device"]["kind"] != "cuda", record["device"]["name"]))


def table(found: list[dict]):
    """Records as a pandas DataFrame: a row each, what the Performance page shows of `fit` and the plain loop."""
    import pandas as pd
    pd.set_option("display.max_colwidth", None)               # a notebook shows what became of the aims, whole
    lines = []
    for record in found:
        plain, fit = record["rows"]["plain"], record["rows"]["fit"]
        values = (device(record), record["work"], record["settings"]["batch"], rate(plain), rate(fit), ratio(fit),
                  achieved(fit), memory(plain), memory(fit), "; ".join(map(aim, record["aims"])) or "–",
                  f"{record['company']['others']:.2f}")
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return pd.DataFrame(lines, columns=COLUMNS).set_index(list(COLUMNS[:2]))


def variants(found: list[dict]):
    """The variants of all records as a pandas DataFrame: how fast each is beside `fit` as the book calls it."""
    import pandas as pd
    lines = []
    for record in found:
        for name, row in record["rows"].items():
            if name not in ("plain", "fit"):
                lines.append({"device": device(record), "work": record["work"], "variant": name, "[steps/s]": rate(row),
                              "variant / plain": ratio(row), "variant / fit": f"{faster(record, name):.2f}"})
    columns = ["device", "work", "variant", "[steps/s]", "variant / plain", "variant / fit"]
    return pd.DataFrame(lines, columns=columns).set_index(columns[:3])


def faster(record: dict, name: str) -> float:
    """How many times as fast a row is as `fit`: the median over turns."""
    own, fit = record["rows"][name]["seconds_per_step"], record["rows"]["fit"]["seconds_per_step"]
    ratios = sorted(b / a for a, b in zip(own, fit, strict=True))
    return (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2


# ------------------------------------------------------------------------------------------------ words
def device(record: dict) -> str:
    """The device, on the CPU with the number of threads."""
    info = record["device"]
    threads = f", {info['threads']} thread{'s' * (info['threads'] > 1)}" if info["kind"] == "cpu" else ""
    return info["name"] + threads


def three(value: float) -> str:
    """A number with three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def rate(row: dict) -> str:
    """Steps per second: the median over turns and, in brackets, the quartiles."""
    found = row["steps_per_second"]
    return f"{three(found['median'])} [{three(found['q1'])}, {three(found['q3'])}]"


def ratio(row: dict) -> str:
    """How many times as fast as the plain loop: the median over turns and its interval."""
    found = row["ratio"]
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def achieved(row: dict) -> str:
    """The share of the roof that binds."""
    found = row["achieved"]
    return f"{found['share']:.0%} of " + ("FLOP/s" if found["roof"] == "compute" else "bytes/s")


def memory(row: dict) -> str:
    """Peak memory in MB, if it could be measured."""
    return "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"


def aim(found: dict) -> str:
    """One aim and what became of it."""
    what = {"ratio": f"{found['wanted']:g} times the plain loop", "share": f"{found['wanted']:.0%} of the roofline",
            "rate": f"{found['wanted']:.0f} steps/s"}
    return f"{what[found['what']]}: {'met' if found['met'] else 'missed'}"


def text(record: dict) -> str:
    """A record as the lines that `python -m benchmarks` prints."""
    company, needed, ceiling = (record[name] for name in ("company", "needed", "ceiling"))
    code = record["git"]["commit"][:10] + (" and changes" if record["git"]["dirty"] else "")
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    lines = [f"{record['work']}: {settings}",
             f"  {device(record)}, torch {record['versions']['torch']}, code {code}, {record['turns']} turns of "
             f"{record['steps_per_turn']} steps, the plain loop fed by {record['feed']}"]
    head = ("", "steps/s [quartiles]", "times plain", "FLOP/s", "bytes/s", "binds", "MB", f"mean {record['metric']}")
    rows = [head, *(_line(name, row) for name, row in record["rows"].items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  " + "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    fit = record["rows"]["fit"]
    own, other = (f"{needed[name]['flop'] / 1e9:.3g} GFLOP and {needed[name]['bytes'] / 1e9:.3g} GB"
                  for name in (fit["precision"], "plain"))
    roofs = (f"{name} {value / 1e9:.4g} G{'B' if name == 'bytes' else 'FLOP'}/s" for name, value in ceiling.items())
    lines += [f"  a step of fit needs {own}, which the shares are of; one of the plain loop {other}",
              f"  ceilings measured: {', '.join(roofs)}",
              f"  intervals of ratios hold the median with probability {fit['ratio']['coverage']:.1%}"]
    lines += [f"  {name} cannot run here: {why}" for name, why in record["failed"].items()]
    lines.append(f"  {'DISTURBED: ' * (company['others'] > BUSY)}other processes kept {company['others']:.2f} of "
                 f"{company['cores']} cores busy (load average {company['load_before']:g} before, "
                 f"{company['load_after']:g} after)")
    lines += [f"  aim: {aim(one)} ({one['got']:.2f})" for one in record["aims"]]
    if record["held_by"]:
        lines.append("  what holds it, by operators' own share of the eager step: "
                     + ", ".join(f"{one['operator']} {one['share']:.0%}" for one in record["held_by"]))
    return "\n".join(lines)


def _line(name: str, row: dict) -> tuple[str, ...]:
    value = three(row["value"]) if math.isfinite(row["value"]) else "–"
    if name == "plain":
        return name, rate(row), "1", "–", "–", "–", memory(row), value
    own = row["achieved"]
    shares = f"{own['flop_share']:.0%}", f"{own['bytes_share']:.0%}"
    return name, rate(row), ratio(row), *shares, own["roof"], memory(row), value
