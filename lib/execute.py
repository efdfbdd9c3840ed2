"""Run one notebook with papermill: a time limit, one retry if its kernel dies, an environment that spoils nothing."""
import contextlib
import logging
import os
import sys
import threading
from pathlib import Path

from lib import BookError

# kernels inherit the first and then draw no figure; with the second each of them compiles torch anew
ENVIRONMENT = {"MPLBACKEND": None, "PYTHONDONTWRITEBYTECODE": None}


class ExecutionError(BookError):
    """The notebook could not be run to its end for a reason that is not its own."""


class TimeLimitError(ExecutionError):
    """The time limit was reached; the kernel is gone."""


def execute(source: Path, target: Path, values: dict, limit: float, environment: dict | None = None, prepare=None):
    """Run `source` from its own folder with parameters `values` into `target`; returns the executed notebook.

    limit: seconds for everything; environment: more variables for the kernel (None unsets); prepare: called before
    each attempt. Raises papermill's PapermillExecutionError when a cell raises; TimeLimitError; ExecutionError when the
    kernel dies twice or the target cannot be written.
    """
    from papermill import PapermillExecutionError, execute_notebook
    from papermill.exceptions import PapermillException
    for name in ("papermill", "asyncio"):                  # what they and the kernel log is said here, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = {"kernel_name": "python3", "language": "python", "cwd": source.parent, "progress_bar": False,
                 "iopub_timeout": 60, "extra_arguments": ["--log-level=50"]}
    with _environment(ENVIRONMENT | (environment or {})), _time_limit(limit) as expired:
        for attempt in (1, 2):
            if prepare:
                prepare()
            try:
                return execute_notebook(_escaped(source), _escaped(target), values, **arguments)
            except PapermillExecutionError:
                raise
            except PapermillException as error:
                raise ExecutionError(f"papermill refuses it: {error}") from None
            except (RuntimeError, OSError) as error:       # RuntimeError: so nbclient calls a dead kernel
                if expired.is_set():
                    raise TimeLimitError(f"took more than {limit:g} s") from None
                if isinstance(error, OSError):
                    raise ExecutionError(f"cannot be executed: {error}") from None
                if attempt == 2:
                    raise ExecutionError(f"the kernel died twice ({error}): too little memory?") from None
                print(f"the kernel died ({error}): once more", file=sys.stderr)


def _escaped(path: Path) -> str:
    """A path as papermill wants it, which fills in the parameters that it finds in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _time_limit(seconds: float):
    """Kill the kernels that the body starts once the time is up; yields an event that is set then.

    The body finds its kernel dead; an exception raised into it by a signal might get lost in papermill's event loop.
    """
    import psutil
    over, expired = threading.Event(), threading.Event()
    spared = set(psutil.Process().children(recursive=True))

    def watch():
        if not over.wait(min(seconds, threading.TIMEOUT_MAX)):
            expired.set()
            while not over.wait(0.5):
                for child in set(psutil.Process().children(recursive=True)) - spared:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield expired
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def _environment(values: dict):
    """Set environment variables for the body's children; None unsets."""
    def put(values):
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    before = {name: os.environ.get(name) for name in values}
    put(values)
    try:
        yield
    finally:
        put(before)
