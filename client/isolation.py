"""The first thing a worker process does: cut itself off, before any library has started a thread.

Source: unshare(2), prctl(2). Rules: nothing but the standard library is imported here, because the kernel
refuses a user namespace to a process with threads; the worker dies with its supervisor and leaves no core.
"""

import ctypes
import resource
import signal
import sys
from typing import Any, Final

from common.errors import FailureError

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
PR_SET_PDEATHSIG: Final = 1
FORBIDDEN_EVENTS: Final = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "urllib.",
    "ftplib.",
    "smtplib.",
)


def end_with_supervisor() -> None:
    """Die with the thread that started this process, and leave no core dump."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def cut_off() -> bool:
    """Give up the network, core dumps and survival of the supervisor; true when the network is really gone.

    Assumes: where the kernel grants no network namespace, native code makes no socket of its own.
    """
    end_with_supervisor()
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.unshare(CLONE_NEWNET) == 0 or libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def _refuse(event: str, _arguments: tuple[Any, ...]) -> None:
    if event.startswith(FORBIDDEN_EVENTS):
        raise FailureError("worker.isolated", f"the worker may not do this: {event}")


def refuse_sockets_and_processes() -> None:
    """From here on, in this process, Python makes no socket and no process; it cannot be undone.

    Guarantee: worker_has_no_network - a socket cannot be made after this, in this process.
    """
    sys.addaudithook(_refuse)


def main() -> None:
    """Cut off, then become the worker."""
    without_network = cut_off()
    from client.worker import main as work

    work(without_network)


if __name__ == "__main__":
    main()
