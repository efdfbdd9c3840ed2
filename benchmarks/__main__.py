"""python -m benchmarks: `train.fit` beside a plain PyTorch loop, in one process and in turns.

    python -m benchmarks                                          # every work at its own size, a minute each
    python -m benchmarks symmetric --batch 1024 --seconds 20      # one work, larger batches, less time
    python -m benchmarks symmetric --variants all                 # and what graphs, precision, layout, threads change
    python -m benchmarks --record                                 # for the book: a clean commit, a quiet machine

Prints a table for each work and writes runs/benchmarks/<device>-<work>.json.
"""
import argparse
import importlib
import shlex
import sys

from benchmarks import harness, records
from lib import BookError, data, root, runs, train

WORKS = ("symmetric", "autoencoders", "gmm", "semhash", "vampprior", "celeba-gan", "celeba-joint")
EMBEDDED = {"mnist": "digits", "celeba": "shapes"}                   # images of the same size that need no file


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One clear line on stderr for every foreseen error."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
        git = runs.git_state()
        if options.record:
            records.check_committed(git)
        for name in options.work or WORKS:
            record = _measure(name, options, git)
            print(records.text(record))
            written = [records.write(root() / "runs" / "benchmarks", record)]
            for path in written + [records.keep(record)] * options.record:
                print(f"  written: {path.relative_to(root())}", flush=True)
        return 0
    except (BookError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"{', '.join(WORKS)} (default: all)")
    parser.add_argument("--batch", type=int, help="items a step (default: the work's own)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="another setting of the work, e.g. width=16 or item_every=50 (repeatable)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of all turns, about (default %(default)g)")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each loop (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="tf32", help="of fit: fp32, tf32 (CUDA only) or bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    kinds = "; ".join(f"on {kind} {', '.join(found)}" for kind, found in harness.VARIANTS.items())
    parser.add_argument("--variants", default="", metavar="LIST",
                        help="variants of fit to measure as well, separated by commas, or `all` (without `compiled` on "
                        f"the CPU, which takes a minute to begin with): {kinds}")
    parser.add_argument("--record", action="store_true", help="also write into book/results/benchmarks")
    return parser


def _check(options) -> None:
    if wrong := [name for name in options.work if name not in WORKS]:
        raise harness.BenchmarkError(f"there is no benchmark {wrong[0]!r}{runs.nearest(wrong[0], WORKS)}")
    if options.seconds <= 0 or options.repeats < 1 or (options.threads is not None and options.threads < 1):
        raise harness.BenchmarkError("--seconds, --repeats and --threads must be positive")
    if bad := next((word for word in options.set if "=" not in word), None):
        raise harness.BenchmarkError(f"--set needs NAME=VALUE, got {bad!r}")


def _measure(name: str, options, git: dict) -> dict:
    """The record of one work."""
    work, device = importlib.import_module(f"benchmarks.{name.replace('-', '_')}"), train.device(options.device)
    defaults = work.SETTINGS | (work.CUDA if device.type == "cuda" else {})
    changes = dict(word.split("=", 1) for word in options.set)
    settings = settings_of(name, defaults, changes | ({"batch": str(options.batch)} if options.batch else {}))
    asked = tuple(word.strip() for word in options.variants.split(",") if word.strip())
    if asked == ("all",):
        asked = tuple(one for one in harness.VARIANTS[device.type] if (device.type, one) != ("cpu", "compiled"))
    own = {"precision": options.precision, "seconds": options.seconds, "repeats": options.repeats,
           "threads": options.threads, "variants": asked}
    found = harness.measure(work, settings, device, **own, say=lambda line: print(f"{name}: {line}", file=sys.stderr))
    return records.make(name, settings, own, _command(name, settings, own, defaults), device, git, found)


def settings_of(name: str, defaults: dict, changes: dict[str, str]) -> dict:
    """The work's settings with the changes asked for. BenchmarkError: an unknown name, a value of another type.

    MNIST or CelebA, if it is not at hand and was not asked for, is replaced by an embedded data set: see EMBEDDED.
    """
    settings = dict(defaults)
    if (dataset := settings.get("dataset")) in EMBEDDED and not data.find(dataset):
        settings["dataset"] = EMBEDDED[dataset]
    for key, text in changes.items():
        if key not in defaults:
            raise harness.BenchmarkError(f"{name} has no setting {key!r}{runs.nearest(key, defaults)}")
        kind = type(defaults[key])
        try:
            settings[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise harness.BenchmarkError(f"{key} must be {kind.__name__}, got {text!r}") from None
    if settings["batch"] < 1 or settings["item_every"] < 1:
        raise harness.BenchmarkError("batch and item_every must be at least 1")
    return settings


def _command(name: str, settings: dict, own: dict, defaults: dict) -> str:
    """The command line that measures this again."""
    words = [f"--set={key}={value}" for key, value in settings.items() if value != defaults[key]]
    words += [f"--seconds={own['seconds']:g}", f"--repeats={own['repeats']}"]
    words += [f"--threads={own['threads']}"] * bool(own["threads"])
    words += [f"--precision={own['precision']}"] * (own["precision"] != "tf32")
    words += [f"--variants={','.join(own['variants'])}"] * bool(own["variants"])
    return shlex.join(["python", "-m", "benchmarks", name, *words])


if __name__ == "__main__":
    sys.exit(main())
