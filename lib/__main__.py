"""python -m lib: run experiments, look after their data, build the report."""
import argparse
import sys

from lib import BookError, runs
from lib import verify as verification


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

    for add in (_add_run, _add_sweep, _add_records, _add_book):
        add(actions)
    return parser


def _add_run(actions) -> None:
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
    run.add_argument("--wait", action="store_true", help="if another process runs this very run, wait until it has")
    run.add_argument("--gpu", action="store_true", help="of several GPUs take one that no other run has taken so")
    run.set_defaults(act=_run)


def _add_sweep(actions) -> None:
    sweep = actions.add_parser("sweep", help="run every configuration of a sweep, here or on a cluster",
                               description="Run what is to do of a sweep of notebooks/presets.yml. What is done stays, "
                               "what was interrupted goes on, what has other parameters now is set aside and run anew.")
    sweep.add_argument("name", nargs="?", help="name of the sweep, e.g. semantic-hashing")
    sweep.add_argument("--list", action="store_true", help="print every sweep and its number of runs")
    sweep.add_argument("--preset", default="smoke", help="size of the runs: smoke (default), cpu, paper, ...")
    sweep.add_argument("--seeds", type=int, metavar="N", help="seeds 1 to N (default: the sweep's own; smoke: 1)")
    sweep.add_argument("--dry-run", action="store_true", help="print every configuration, run nothing")
    sweep.add_argument("--profile", default="local", help="local (default), slurm, or a folder with a config.yaml")
    sweep.add_argument("--cores", type=int, metavar="N", help="at most N cores here, or jobs on a cluster, at once")
    sweep.add_argument("--gpus", type=int, metavar="N", help="at most N GPUs at once; 0 asks for none")
    sweep.add_argument("--timeout", type=float, default=86400, help="time limit of a run in seconds (%(default)g)")
    sweep.add_argument("--again", action="store_true", help="also run anew what was made by other code")
    sweep.set_defaults(act=_sweep)


def _add_records(actions) -> None:
    record = actions.add_parser("record", help="copy complete runs into the book, after checking all of them",
                                description="Check runs, then copy them into book/results with their checksums; one at "
                                "the defaults goes to book/smoke, which `verify` runs again.")
    record.add_argument("run", nargs="+", help="run folders, e.g. runs/gmm/paper-seed=2, or 'runs/gmm/*'")
    record.add_argument("--without-pictures", action="store_true", help="numbers only, for one of many runs of a sweep")
    record.add_argument("--forget", action="store_true", help="remove recorded runs instead, e.g. gmm/paper-seed=2")
    record.set_defaults(act=_record)

    verify = actions.add_parser("verify", help="run recorded runs again and compare their numbers",
                                formatter_class=argparse.RawDescriptionHelpFormatter, description=verification.__doc__)
    verify.add_argument("name", nargs="*", help="e.g. gmm, its smoke run; gmm/paper (default: every smoke run)")
    verify.add_argument("--seeds", type=int, default=0, metavar="N",
                        help="train N further seeds of a run that differs, and judge it by their scatter")
    verify.set_defaults(act=_verify)

    release = actions.add_parser("release", help="check that HEAD alone gives the committed tables",
                                 description="Check the checksums, build the report in a fresh clone of HEAD and "
                                 "compare every table of recorded runs with the committed one.")
    release.add_argument("--built", metavar="FOLDER", help="compare what is built already, e.g. build/book, instead")
    release.set_defaults(act=_release)


def _add_book(actions) -> None:
    known = actions.add_parser("data", help="list the data sets: where they are, licence, how to get them")
    known.add_argument("--fetch", metavar="NAME", help="download one into $VAEBOOK_DATA, or ./data")
    known.set_defaults(act=_data)

    board = actions.add_parser("scoreboard", help="print every published number beside what was obtained")
    board.add_argument("--format", choices=("text", "csv", "json"), default="text", help="default: %(default)s")
    board.set_defaults(act=_scoreboard)

    for name, text in (("report", "execute the notebooks and build the HTML"),
                       ("refresh", "renew the committed outputs of the notebooks")):
        actions.add_parser(name, help=text).set_defaults(act=_report if name == "report" else _refresh)


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
                     threads=options.threads, again=options.again, wait=options.wait, gpu=options.gpu))
    return 0


def _sweep(options) -> int:
    from lib import sweeping, sweeps
    if options.list:
        print(sweeping.listing())
        return 0
    if not options.name:
        raise runs.RunError(f"name a sweep: {', '.join(sweeps.definitions())} (--list shows their sizes)")
    sweep = sweeps.load(options.name, options.preset, options.seeds)
    if options.dry_run:
        print(sweeping.described(sweep, options.again))
        return 0
    return sweeping.run(sweep, options.profile, options.cores, options.gpus, options.again, options.timeout)


def _record(options) -> int:
    from lib import integrity, recording
    lines = map(integrity.forget, options.run) if options.forget else \
        recording.record(options.run, not options.without_pictures)
    for line in lines:
        print(line)
    return 0


def _verify(options) -> int:
    return verification.verify(options.name, options.seeds)


def _release(options) -> int:
    from lib import release
    return release.check(options.built)


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


def _scoreboard(options) -> int:
    from lib import front, scoreboard
    frame = scoreboard.score(scoreboard.flatten(scoreboard.load()), runs.records())
    print(front.FORMATS[options.format](frame), end="")
    return 0


def _report(options) -> int:
    from lib import report
    return report.build()


def _refresh(options) -> int:
    from lib import report
    return report.refresh()


if __name__ == "__main__":
    sys.exit(main())
