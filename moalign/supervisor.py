"""The command line's work in a process of its own, so that a plugin that dies or hangs takes only that with it.

The parent does nothing but wait. Where a call into a plugin ends the child, or does not return before its deadline, the
parent says so and forks another child, which does the same work without the candidate, observer or distribution that
the call was for (``calls.deaths``). Everything else that ends a child ends the parent in the same way.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
from typing import IO

from moalign import calls
from moalign.calls import Death, Record

VARIABLE = "MOALIGN_IN_PROCESS"  # set: no second process, as a debugger wants it
LOOK = 0.25  # seconds between looks at a call under way
SECONDS_TO_LEAVE = 2.0
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
CRASHES = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
}
PR_SET_PDEATHSIG = 1


def stand_by() -> int | None:
    """Fork a child for the work: None in the child; in the parent, when it is over, the exit code.

    None as well where nobody stands by: on systems without ``sigtimedwait``, or when the environment has
    MOALIGN_IN_PROCESS.
    """
    if not hasattr(signal, "sigtimedwait") or os.environ.get(VARIABLE):
        return None
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON | {signal.SIGCHLD})
    deaths: tuple[Death, ...] = ()
    while True:
        record = Record()
        with _in_memory() as stack:
            sys.stdout.flush()
            sys.stderr.flush()
            parent = os.getpid()
            child = os.fork()
            if child == 0:
                _begin(parent, record, deaths, stack)
                return None
            status, overdue = _wait(child, record)
            death = _death(status, overdue, record, stack)
        if death is None:
            return status if status >= 0 else 128 - status
        final = death.call.dispensable in {None, *(earlier.call.dispensable for earlier in deaths)}
        _tell(death, final)
        if final:
            return 1
        deaths += (death,)


def _in_memory() -> IO[bytes]:
    """A file for the child's stack, which needs no space on any disk where the system has such."""
    return os.fdopen(os.memfd_create("stack"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def _begin(parent: int, record: Record, deaths: tuple[Death, ...], stack: IO[bytes]) -> None:
    """In the child: it dies with its parent, takes signals, and leaves its stack behind where it dies of one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent has died before it could be tied to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON | {signal.SIGCHLD})
    faulthandler.enable(file=os.dup(stack.fileno()), all_threads=False)
    calls.watched_by(record, deaths)


def _wait(child: int, record: Record) -> tuple[int, bool]:
    """The child's exit code, negative for a signal; and whether it was ended because a call took too long.

    Time counts from look to look, and no gap counts for more than two, so that time in which both are stopped does not.
    """
    last, seconds, before = -1, 0.0, time.monotonic()
    while True:
        found = signal.sigtimedwait(PASSED_ON | {signal.SIGCHLD}, LOOK)
        if found is not None and found.si_signo in PASSED_ON and found.si_code <= 0:
            os.kill(child, found.si_signo)  # the terminal's own Ctrl-C (a positive code) has reached the child already
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), False
        now = time.monotonic()
        seconds, before = seconds + min(now - before, 2 * LOOK), now
        number, call = record.read()
        if number != last:
            last, seconds = number, 0.0
        elif call is not None and call.deadline is not None and seconds > call.deadline:
            return _cut(child), True


def _cut(child: int) -> int:
    """End the child, which first writes its stack, as faulthandler does on SIGABRT."""
    for number, patience in ((signal.SIGABRT, SECONDS_TO_LEAVE), (signal.SIGKILL, None)):
        os.kill(child, number)
        until = None if patience is None else time.monotonic() + patience
        while until is None or time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    raise AssertionError("a killed process has not ended")


def _death(status: int, overdue: bool, record: Record, stack: IO[bytes]) -> Death | None:
    """What a plugin did to the child; None where it ended otherwise, which is said where it was by a signal."""
    _, call = record.read()
    stack.seek(0)
    where = first_place(stack.read().decode(errors="replace"))
    if overdue and call is not None:
        return Death(call, f"did not return within {call.deadline:g} seconds", where)
    if call is not None and (status >= 0 or -status in CRASHES):
        return Death(call, how_it_ended(status), where)
    if status < 0 and -status not in PASSED_ON:
        reason = f"the process {how_it_ended(status)}" + (f", at {where}" if where else "")
        _say(f"{reason}{'; perhaps for want of memory' if -status == signal.SIGKILL else ''}")
    return None


def how_it_ended(status: int) -> str:
    """An exit code, negative for a signal, as part of a sentence."""
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended the process with exit code {status}"


def first_place(stack: str) -> str:
    """The innermost place of a stack that faulthandler wrote; "" where there is none."""
    return next((line.strip() for line in stack.splitlines() if line.startswith('  File "')), "")


def _tell(death: Death, final: bool) -> None:
    if final:
        _say(f"error: {death.reason}")
    else:
        kind, name = death.call.dispensable or ("", "")
        _say(f"warning: {death.reason}; going on without {name if kind == 'distribution' else f'this {kind}'}")


def _say(what: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            stream.write("\x1b[?25h\n")  # a progress display that was cut off has left the cursor hidden
            stream.flush()
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()
