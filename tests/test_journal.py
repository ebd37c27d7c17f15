"""A journal loses no acknowledged record, wherever a process or the disk stops."""

import errno
import logging
import os
import random
import subprocess
import sys

import pytest

from moalign import storage
from moalign.errors import CorruptFileError, MoalignError, RunError
from moalign.sweeps import journal

EVENTS = [
    {"type": "done", "id": f"c{i}", "scores": {"a": i / 3, "b": -i}, "text": "line\nbreak é \ud800"} for i in range(6)
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal.jsonl"
    for number, event in enumerate(EVENTS, start=1):
        assert journal.append(path, event) == number
    return path


def test_events_come_back_in_order(path):
    assert journal.read(path) == EVENTS
    assert journal.torn(path) == 0
    assert path.read_bytes().count(b"\n") == len(EVENTS)


def test_no_file_is_no_history(tmp_path):
    assert journal.read(tmp_path / "journal.jsonl") == []
    (tmp_path / "journal.jsonl").touch()
    assert journal.read(tmp_path / "journal.jsonl") == []


def test_equal_histories_are_equal_bytes(path, tmp_path):
    for event in EVENTS:
        journal.append(tmp_path / "again", dict(reversed(event.items())))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_cut_at_every_byte_of_the_last_three_records_then_appended_twice(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(ends[-4], len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert journal.read(path) == EVENTS[:kept]
        assert journal.torn(path) == size - ends[kept - 1]
        assert journal.append(path, {"new": 1}) == kept + 1
        assert journal.append(path, {"new": 2}) == kept + 2
        assert journal.read(path) == [*EVENTS[:kept], {"new": 1}, {"new": 2}]
        assert path.read_bytes().startswith(whole[: ends[kept - 1]])


@pytest.mark.parametrize(
    "tail", [b"\0" * 64, b"\0" * 63 + b"\n", b"garbage\n", b"{}\n", b"[]\n", b"\xff\n", b"1\n", b"\n"]
)
def test_a_damaged_tail_is_left_out_with_a_warning(path, tail, caplog):
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with caplog.at_level(logging.WARNING):
        assert journal.read(path) == EVENTS
    assert f"{path}:7" in caplog.text
    journal.append(path, {"new": 1})
    assert journal.read(path) == [*EVENTS, {"new": 1}]
    kept = path.with_name(f"{path.name}.damaged-{len(whole)}")
    assert (kept.read_bytes() == tail) if tail.endswith(b"\n") else not kept.exists()


def test_every_flipped_bit_before_the_last_line_is_found_with_its_line(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    rng = random.Random(0)
    # All bits of one line, its line break among them, and a sample of the others.
    bits = [*range(8 * ends[1], 8 * ends[2]), *(rng.randrange(8 * (ends[-2] - 1)) for _ in range(1000))]
    for bit in bits:
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(altered)
        line = whole[: bit // 8].count(b"\n") + 1
        with pytest.raises(CorruptFileError, match=rf"journal\.jsonl:{line}:"):
            journal.read(path)
        with pytest.raises(CorruptFileError):
            journal.append(path, {})
        assert path.read_bytes() == altered


def test_no_flipped_bit_of_the_last_line_is_taken_for_an_event(path):
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for bit in range(8 * start, 8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(altered)
        try:
            assert journal.read(path) == EVENTS[:-1] and journal.torn(path) > 0
        except CorruptFileError as error:  # the flip made a line break
            assert f"{path}:6" in str(error)


@pytest.mark.parametrize("change", ["missing", "last but one missing", "twice", "swapped"])
def test_sequence_gaps_are_found(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "missing":
        del lines[2]
    elif change == "last but one missing":
        del lines[-2]
    elif change == "twice":
        lines.append(lines[-1])
    else:
        lines[-1], lines[-2] = lines[-2], lines[-1]
    path.write_bytes(b"".join(lines))
    with pytest.raises(CorruptFileError, match=r"event \d stands where event \d belongs"):
        journal.read(path)


@pytest.mark.parametrize("event", [{"score": float("nan")}, {"x": object()}])
def test_an_event_that_is_not_json_changes_nothing(path, event):
    before = path.read_bytes()
    with pytest.raises(MoalignError, match="JSON"):
        journal.append(path, event)
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_journal_as_it_was(path, monkeypatch, call):
    before = path.read_bytes()
    real = os.write

    def full(descriptor, data=b""):
        if data:
            real(descriptor, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, call, full)
        with pytest.raises(RunError, match=r"journal\.jsonl.*No space"):
            journal.append(path, {"new": 1})
    assert path.read_bytes() == before
    journal.append(path, {"new": 1})
    assert journal.read(path) == [*EVENTS, {"new": 1}]


def test_killed_while_appending(tmp_path):
    """SIGKILL at a random moment: what was acknowledged is there, and appending goes on."""
    path = tmp_path / "journal.jsonl"
    code = """
import sys
from moalign.sweeps import journal
while True:
    print(journal.append(sys.argv[1], {"x": "y" * 5000}), flush=True)
"""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(5)]
        writer.kill()
        writer.wait()
        acknowledged = int((writer.stdout.read().splitlines() or lines)[-1])
        writer.stdout.close()
        assert acknowledged <= len(journal.read(path)) <= acknowledged + 1
