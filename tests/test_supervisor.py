"""The process that stands by: what it does when a plugin ends or hangs the one that works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moalign.calls import SIZE, Call, Death, Record

BEGIN = """
import os, signal, sys, time
from moalign import calls, supervisor
from moalign.calls import Call
code = supervisor.stand_by()
if code is not None:
    sys.exit(code)
gone = [death.call.dispensable[1] for death in calls.deaths()]
print("working without", gone, flush=True)
def calling(candidate, hook="loss", deadline=None, kind="objective"):
    return calls.under_way(Call("objective 'odd' of somebodys 2.0", "somebodys", hook, candidate, deadline, kind))
"""


def run(work: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + work],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("os._exit(3)", "ended the process with exit code 3"),
        ("os._exit(0)", "ended the process with exit code 0"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("os.abort()", "died of SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "died of SIGSEGV"),
    ],
)
def test_what_takes_the_process_is_done_without(deed, how):
    done = run(f"""
for candidate in ("first", "second", "third"):
    if candidate not in gone:
        with calling(candidate):
            if candidate != "second":
                {deed}
        print("done", candidate)
""")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "working without []",
        "working without ['first']",
        "done second",
        "working without ['first', 'third']",
        "done second",
    ]
    for candidate in ("first", "third"):
        assert f"warning: objective 'odd' of somebodys 2.0, in loss for candidate {candidate}, {how}" in done.stderr
    assert "going on without this candidate" in done.stderr


def test_the_place_of_a_crash_is_named():
    done = run("""
def faulty():
    os.kill(os.getpid(), signal.SIGSEGV)
with calling(""):
    faulty()
""")
    assert done.returncode == 1
    assert done.stderr.startswith("error: objective 'odd' of somebodys 2.0, in loss, died of SIGSEGV, at File ")
    assert done.stderr.rstrip().endswith("in faulty")


@pytest.mark.parametrize("deed", ["time.sleep(60)", "while True: pass", "signal.pause()"])
def test_a_hang_is_cut_at_its_deadline(deed):
    begin = time.monotonic()
    done = run(f"""
if not gone:
    with calling("slow", deadline=0.5):
        {deed}
print("the rest")
""")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the rest"
    assert "in loss for candidate slow, did not return within 0.5 seconds, at File " in done.stderr
    assert 0.5 < time.monotonic() - begin < 20


def test_a_hang_that_takes_no_signal_is_cut_too():
    done = run("""
if not gone:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    with calling("slow", deadline=0.1):
        time.sleep(60)
""")
    assert done.returncode == 0 and "did not return within 0.1 seconds" in done.stderr


def test_many_quick_calls_are_no_hang():
    done = run("""
end = time.monotonic() + 1.5
while time.monotonic() < end:
    with calling("quick", deadline=0.5):
        time.sleep(0.001)
""")
    assert done.returncode == 0 and not done.stderr


def test_between_calls_and_without_a_deadline_anything_may_take_any_time():
    done = run("""
time.sleep(0.8)
with calling("", deadline=None):
    time.sleep(0.8)
""")
    assert done.returncode == 0 and not done.stderr


def test_a_call_within_a_call_leaves_the_outer_one_under_way():
    done = run("""
with calling("outer"):
    with calling("inner"):
        pass
    os._exit(1)
""")
    assert "candidate outer, ended the process" in done.stderr and "inner" not in done.stderr


def test_what_cannot_be_done_without_ends_the_work():
    done = run("""
with calling("", hook="propose"):
    os._exit(0)
""")
    assert done.returncode == 1 and done.stdout.count("working") == 1
    assert done.stderr == "error: objective 'odd' of somebodys 2.0, in propose, ended the process with exit code 0\n"


def test_what_happens_again_ends_the_work():
    done = run("""
with calling("same"):
    os._exit(0)
""")
    assert done.returncode == 1 and done.stdout.count("working") == 2
    assert done.stderr.splitlines()[-1].startswith("error: objective 'odd'")


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(5)", 5), ("pass", 0), ("raise ValueError('own')", 1)])
def test_exit_codes_are_the_childs(code, expected):
    done = run(code)
    assert done.returncode == expected and done.stdout.count("working") == 1
    assert ("ValueError: own" in done.stderr) == (expected == 1)


def test_a_death_outside_of_any_call_is_told_and_not_tried_again():
    done = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 128 + signal.SIGKILL and done.stdout.count("working") == 1
    assert done.stderr == "the process died of SIGKILL; perhaps for want of memory\n"


def test_a_kill_in_the_middle_of_a_call_is_not_the_plugins_doing():
    done = run("with calling('one'): os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 128 + signal.SIGKILL and "odd" not in done.stderr


def test_in_one_process_where_somebody_wants_that():
    done = run("print(os.getppid() == int(os.environ['ME'])); os._exit(7)", MOALIGN_IN_PROCESS="1", ME=str(os.getpid()))
    assert done.returncode == 7 and "True" in done.stdout


def started(work: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", BEGIN + work], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "working without []\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_one_that_stands_by_are_passed_on(number):
    child = started(f"""
def told(number, frame):
    print("told", number, flush=True)
    sys.exit(42)
signal.signal({int(number)}, told)
print("ready", flush=True)
time.sleep(60)
""")
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.wait(20) == 42
    assert child.stdout.read() == f"told {int(number)}\n"


def test_the_one_that_works_dies_with_the_one_that_stands_by():
    child = started("print(os.getpid(), flush=True)\ntime.sleep(60)")
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    child.kill()
    child.wait(20)
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    state = Path(f"/proc/{worker}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_record_holds_any_call():
    record = Record()
    assert record.read() == (0, None)
    call = Call("objective 'ö' of x 1", "x", "loss", "c", 0.5, "objective")
    record.write(call)
    assert record.read() == (2, call)
    record.write(Call("long " * SIZE, "x", "loss"))
    number, found = record.read()
    assert number == 4 and found is not None and found.who.startswith("long long")
    record.write(None)
    assert record.read() == (6, None)


def test_a_death_is_a_sentence():
    call = Call("reward 'r' of d 1.0", "d", "score")
    assert Death(call, "died of SIGSEGV").reason == "reward 'r' of d 1.0, in score, died of SIGSEGV"
    importing = Call("entry point 'e' of d 1.0", "d", "import")
    expected = "importing entry point 'e' of d 1.0, died of SIGBUS, at here"
    assert Death(importing, "died of SIGBUS", "here").reason == expected
