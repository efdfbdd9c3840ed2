"""Locks on files, which the system releases at the death of their holder."""
import fcntl

from lib import BookError

KERNEL_ENDS = 2              # seconds: a kernel outlives the process that ran it, if that was killed, by less


def locked(file) -> bool:
    """Whether an open file could be locked for this process; False: another one holds it.

    Raises BookError if its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise BookError(f"{file.name} is on a file system that cannot lock ({error.strerror}): mount it with locks, or "
                        "have the checkout on another one") from None
    return True
