"""The one exception that people see, a single clear line and no traceback, and how commands end with it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. Its text names the thing, the value and what would be right.

    everywhere: every rank raises the same, so that one of each host says it."""

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class Unreachable(UserError):
    """Something could not be read or written because what holds it does not answer; it may be as good as ever."""


class Stopped(Exception):
    """The run was asked to end before its last step, and has saved: the same command goes on."""

    def say(self) -> None:
        """Once on each host, whose launcher looks for it."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"stopped: {self}", file=sys.stderr, flush=True)


OTHERS_SECONDS = 10.0  # on a busy machine; the one that says why ends at once, and its launcher ends them
STOPPED = 75  # exit status of the above; sysexits.h: "temporary failure, the user is invited to retry"


def explain_os_error(error: OSError) -> str:
    """One line that names the file and what is wrong with it."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def run_command(command: Callable[[], None]) -> int:
    """Runs a command to its exit status: 0; 1 after one line on standard error; STOPPED; or 130 after Ctrl-C."""
    try:
        command()
    except UserError as error:
        if not error.everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
            _complain(str(error))
        else:  # the first rank that ends has its launcher end the others, also the one that says why
            time.sleep(OTHERS_SECONDS)
        return 1
    except Stopped:
        return STOPPED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        _complain(explain_os_error(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
