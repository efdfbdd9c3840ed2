"""python -m lib: run experiments, look after their data, build the report."""
import argparse
import sys

from lib import BookError, runs


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One clear line on stderr for every foreseen error."""
    options = _parser().parse_args(argv)
    try:
        return options.act(options) or 0
    except (BookError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: `run` goes on from its last checkpoint when repeated", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    run = actions.add_parser("run", help="execute a notebook with parameters into a run folder",
                             description="Execute a notebook with checked parameters. A run that was interrupted "
                             "goes on from its last checkpoint; one that is complete is not repeated without --again.")
    run.add_argument("notebook", nargs="?", help="name of the notebook, e.g. gmm")
    run.add_argument("--list", action="store_true", help="print every notebook, its parameters and presets")
    run.add_argument("--preset", default="", help="named parameters of notebooks/presets.yml: paper, cpu, ...")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set one parameter (repeatable)")
    run.add_argument("--seed", help="short for --set seed=N")
    run.add_argument("--out", help="run folder (default: runs/<notebook>/<preset and changes>)")
    run.add_argument("--threads", type=int, help="CPU threads of the run (default: all)")
    run.add_argument("--timeout", type=float, default=6 * 3600, help="time limit in seconds (default %(default)s)")
    run.add_argument("--again", action="store_true", help="repeat a complete run from the start")
    run.set_defaults(act=_run)

    record = actions.add_parser("record", help="copy complete runs into book/results, after checking them")
    record.add_argument("run", nargs="+", help="run folders, e.g. runs/gmm/paper-seed=2")
    record.add_argument("--without-pictures", action="store_true", help="numbers only, for one of many runs of a sweep")
    record.set_defaults(act=_record)

    known = actions.add_parser("data", help="list the data sets: where they are, licence, how to get them")
    known.add_argument("--fetch", metavar="NAME", help="download one into $VAEBOOK_DATA, or ./data")
    known.set_defaults(act=_data)

    for name, text in (("report", "execute the notebooks and build the HTML"),
                       ("refresh", "renew the committed outputs of the notebooks")):
        actions.add_parser(name, help=text).set_defaults(act=_report if name == "report" else _refresh)
    return parser


def _run(options) -> int:
    from lib import launch
    if options.list:
        print(launch.describe())
        return 0
    if not options.notebook:
        raise runs.RunError(f"name a notebook: {', '.join(runs.notebooks())} (--list shows their parameters)")
    pairs = [word.partition("=") for word in options.set] + ([("seed", "=", options.seed)] if options.seed else [])
    wrong = next((name for name, equals, _ in pairs if not equals), None)
    if wrong is not None:
        raise runs.RunError(f"--set needs NAME=VALUE, got {wrong!r}")
    changes = {name: runs.parse(options.notebook, name, text) for name, _, text in pairs}
    print(launch.run(options.notebook, options.preset, changes, out=options.out, timeout=options.timeout,
                     threads=options.threads, again=options.again))
    return 0


def _record(options) -> int:
    from lib import launch
    for folder in options.run:
        print(launch.record(folder, not options.without_pictures))
    return 0


def _data(options) -> int:
    from lib import data  # imports torch: slow

    if not options.fetch:
        for row in data.listing():
            print("\n".join([row.pop("name"), *(f"  {key:8} {value}".replace("\n", "\n" + 11 * " ")
                                            for key, value in row.items())]))
        return 0
    folder = data.fetch(options.fetch)
    print(f"{options.fetch} is in {folder}" if folder else f"{options.fetch} is embedded: nothing to fetch")
    return 0


def _report(options) -> int:
    from lib import report
    return report.build()


def _refresh(options) -> int:
    from lib import report
    return report.refresh()


if __name__ == "__main__":
    sys.exit(main())
