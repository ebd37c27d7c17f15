"""Files and folders appear whole or not at all, and any altered bit is found with the file's name."""

import errno
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moalign import storage
from moalign.errors import CorruptFileError, MoalignError, RunError


@contextmanager
def failing(monkeypatch, nth, code=errno.ENOSPC):
    """The n-th system call that changes the disk fails, and counts how many there were."""
    calls = {"count": 0}

    def guard(real):
        def call(*arguments, **keywords):
            calls["count"] += 1
            if calls["count"] == nth:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace", "rename", "ftruncate"):
            patch.setattr(storage.os, name, guard(getattr(os, name)))
        yield calls


def files_below(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*")}


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; returns what it held."""
    before = path.read_bytes()
    altered = bytearray(before)
    altered[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(altered)
    return before


# --- files ----------------------------------------------------------------------------------------------------------


def test_json_is_canonical_and_comes_back(tmp_path):
    path = tmp_path / "deep" / "a.json"
    value = {"b": [1, 2.5, None, True], "a": "é \ud800 \x00 <"}
    storage.write_json(path, value)
    first = path.read_bytes()
    storage.write_json(path, dict(reversed(value.items())))
    assert path.read_bytes() == first
    assert first.endswith(b"}\n") and first.index(b'"a"') < first.index(b'"b"')
    assert storage.read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_json_refuses_what_json_cannot_hold(tmp_path, value):
    path = tmp_path / "a.json"
    storage.write_json(path, 1)
    with pytest.raises(MoalignError, match=r"a\.json"):
        storage.write_json(path, {"x": value})
    assert storage.read_json(path) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": 1}\x00'],
)
def test_damaged_json_is_refused_by_name(tmp_path, data):
    path = tmp_path / "state.json"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"state\.json"):
        storage.read_json(path)


def test_missing_file_is_not_called_corrupt(tmp_path):
    with pytest.raises(RunError, match="absent"):
        storage.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_failing_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, code):
    path = tmp_path / "a.txt"
    for nth in range(1, 20):
        storage.write_text(path, "old")
        with failing(monkeypatch, nth, code) as calls:
            try:
                storage.write_text(path, "new")
            except RunError as error:
                assert str(path) in str(error) and os.strerror(code) in str(error)
                assert path.read_text() in ("old", "new")
                # Only the fsync of the folder, after the rename, may fail with the new file in place.
                assert (path.read_text() == "new") == (nth == 4)
            else:
                assert calls["count"] < nth
                break
        assert files_below(tmp_path) == {"a.txt"}
    assert nth == 5, "a write is: write, fsync, rename, fsync of the folder"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(storage.os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    storage.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_append_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "log"
    storage.append_bytes(path, b"one\n")
    storage.append_bytes(path, b"two\ngarb")
    storage.append_bytes(path, b"three\n", keep=8)
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    for nth in (1, 2, 3):
        with failing(monkeypatch, nth), pytest.raises(RunError, match="log"):
            storage.append_bytes(path, b"four\n")
        assert path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("name", ["a", "w=0.7", "a.b-c_d=1", "7", "x" * 128])
def test_safe_names(name):
    assert storage.safe_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\\b", "/a", "a\n", "a b", "-a", "é", "x" * 129, None])
def test_unsafe_names(name):
    assert not storage.safe_name(name)


# --- tensors --------------------------------------------------------------------------------------------------------


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    return {
        "weight": weight,
        "view": weight[1:3],  # shares memory
        "transposed": weight.T,
        "half": weight.bfloat16(),
        "step": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "sha256": torch.ones(1),
    }


def test_tensors_come_back_bitwise(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = example()
    storage.write_tensors(path, tensors, {"candidate": "w=1", "tricky": '"sha256":"' + "0" * 64})
    back = storage.read_tensors(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert storage.read_metadata(path) == {"format": "pt", "candidate": "w=1", "tricky": '"sha256":"' + "0" * 64}


def test_tensor_files_are_a_function_of_their_content(tmp_path):
    tensors = example()
    metadata = {f"key{i}": str(i) for i in range(20)}
    storage.write_tensors(tmp_path / "a", tensors, metadata)
    storage.write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_other_tools_read_the_tensors(tmp_path):
    from safetensors import safe_open

    storage.write_tensors(tmp_path / "a", example(), {"x": "y"})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata()["x"] == "y" and file.metadata()["format"] == "pt"
        assert torch.equal(file.get_tensor("weight"), example()["weight"])


def test_every_flipped_bit_of_a_tensor_file_is_found(tmp_path):
    path = tmp_path / "small.safetensors"
    storage.write_tensors(path, {"a": torch.tensor([1.0, 2.0])}, {"k": "v"})
    for bit in range(8 * path.stat().st_size):
        before = flip(path, bit)
        with pytest.raises(CorruptFileError, match=r"small\.safetensors"):
            storage.read_tensors(path)
        path.write_bytes(before)
    assert torch.equal(storage.read_tensors(path)["a"], torch.tensor([1.0, 2.0]))


def test_every_truncation_of_a_tensor_file_is_found(tmp_path):
    path = tmp_path / "small.safetensors"
    storage.write_tensors(path, {"a": torch.tensor([1.0, 2.0])})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=r"small\.safetensors"):
            storage.read_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptFileError):
        storage.read_tensors(path)


def test_a_huge_shape_in_the_header_allocates_nothing(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]},"__metadata__":{"sha256":"'
    for body in (header + b"0" * 64 + b'"}}', header + b'"}}', b"[]", b'{"__metadata__":[]}', b'{"__metadata__":{}}'):
        path = tmp_path / "huge"
        path.write_bytes(len(body).to_bytes(8, "little") + body)
        with pytest.raises(CorruptFileError, match="huge"):
            storage.read_tensors(path)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptFileError, match="huge"):
        storage.read_tensors(path)


@pytest.mark.parametrize("metadata", [{"sha256": "x"}, {"step": 1}])
def test_bad_metadata_is_refused(tmp_path, metadata):
    with pytest.raises(MoalignError, match="metadata"):
        storage.write_tensors(tmp_path / "a", {}, metadata)


def test_storage_imports_no_torch():
    code = "import sys, moalign.storage; assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- folders --------------------------------------------------------------------------------------------------------


def make(path: Path) -> Path:
    with storage.new_directory(path) as folder:
        storage.write_tensors(folder / "adapter.safetensors", {"a": torch.tensor([1.0, 2.0])})
        storage.write_json(folder / "state.json", {"step": 5})
        storage.write_text(folder / "deep" / "er" / "note.txt", "x")
        (folder / "empty.txt").touch()
    return path


def test_a_new_directory_is_complete_and_verified(tmp_path):
    path = make(tmp_path / "run" / "step-5")
    names = "adapter.safetensors state.json deep deep/er deep/er/note.txt empty.txt MANIFEST.json"
    assert files_below(path) == set(names.split())
    assert storage.verify(path) == []
    listed = storage.read_json(path / "MANIFEST.json")["files"]
    assert listed["deep/er/note.txt"] == {"sha256": storage.sha256_of(path / "deep/er/note.txt"), "size": 1}
    assert [p.name for p in path.parent.iterdir()] == ["step-5"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_directory_leaves_nothing(tmp_path, error):
    with pytest.raises(error), storage.new_directory(tmp_path / "a") as folder:
        storage.write_text(folder / "x", "x")
        raise error
    assert files_below(tmp_path) == set()


def test_an_existing_directory_is_never_overwritten(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(RunError, match="exists already"):
        make(tmp_path / "a")
    assert storage.verify(tmp_path / "a") == []


def test_links_are_not_kept(tmp_path):
    with pytest.raises(RunError, match="link"), storage.new_directory(tmp_path / "a") as folder:
        (folder / "x").symlink_to("/etc/hostname")
    assert files_below(tmp_path) == set()


def test_every_failing_call_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    for nth in range(1, 200):
        previous, current = make(tmp_path / f"{nth}" / "step-1"), tmp_path / f"{nth}" / "step-2"
        with failing(monkeypatch, nth) as calls:
            try:
                make(current)
            except RunError:
                pass
            else:
                assert calls["count"] < nth
                break
        assert storage.verify(previous) == []
        assert not list(current.parent.glob(f"{storage.TEMPORARY}*"))
        if current.exists():
            assert storage.verify(current) == []
    assert nth > 20


def test_a_thousand_flipped_bits_are_found_by_name(tmp_path):
    path = make(tmp_path / "a")
    files = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size]
    rng = random.Random(0)
    for _ in range(1000):
        file = rng.choice(files)
        before = flip(file, rng.randrange(8 * file.stat().st_size))
        with pytest.raises(CorruptFileError) as caught:
            storage.verify(path)
        assert file.name in str(caught.value)
        file.write_bytes(before)
    assert storage.verify(path) == []


def test_missing_replaced_and_unlisted_files(tmp_path):
    path = make(tmp_path / "a")
    (path / "new.txt").write_text("who am I")
    (path / "deep" / "link").symlink_to("/etc")
    assert storage.verify(path) == ["deep/link", "new.txt"]
    (path / "empty.txt").unlink()
    with pytest.raises(CorruptFileError, match=r"empty\.txt.*missing"):
        storage.verify(path)
    (path / "empty.txt").mkdir()
    with pytest.raises(CorruptFileError, match=r"empty\.txt"):
        storage.verify(path)
    (path / "MANIFEST.json").unlink()
    with pytest.raises(CorruptFileError, match="MANIFEST"):
        storage.verify(path)


def test_links_in_the_place_of_files_are_refused(tmp_path):
    path = make(tmp_path / "a")
    (tmp_path / "note.txt").write_text("x")  # the same content, elsewhere
    (path / "deep" / "er" / "note.txt").unlink()
    (path / "deep" / "er" / "note.txt").symlink_to(tmp_path / "note.txt")
    with pytest.raises(CorruptFileError, match="link"):
        storage.verify(path)
    (path / "deep" / "er" / "note.txt").unlink()
    (path / "deep" / "er").rmdir()
    (path / "deep" / "er").symlink_to(tmp_path)
    with pytest.raises(CorruptFileError, match="link"):
        storage.verify(path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..", "", ".", "a//b", "./a", "a\\b", "a\0", "a/"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "a"
    folder.mkdir()
    entry = {"sha256": storage.sha256_of(tmp_path / "secret"), "size": 1}
    storage.write_json(folder / "MANIFEST.json", storage._sealed({name: entry}))
    with pytest.raises(CorruptFileError, match="leaves the folder"):
        storage.verify(folder)


@pytest.mark.parametrize("files", [[], {"a": None}, {"a": {"size": 1}}, "x", None])
def test_manifests_of_a_wrong_form_are_refused(tmp_path, files):
    storage.write_json(tmp_path / "MANIFEST.json", storage._sealed(files))
    with pytest.raises(CorruptFileError, match="MANIFEST"):
        storage.verify(tmp_path)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    code = """
import os, signal, sys
from moalign import storage
with storage.new_directory(sys.argv[1] + "/candidates/c/step-1") as folder:
    storage.write_text(folder / "x", "x")
    (folder.parent / (storage.TEMPORARY + "file")).touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list((tmp_path / "candidates" / "c").iterdir())) == 2
    assert len(storage.leftovers(tmp_path)) >= 2
    assert files_below(tmp_path) == {"candidates", "candidates/c"}
    assert storage.leftovers(tmp_path) == []


# --- the lock -------------------------------------------------------------------------------------------------------


def test_a_second_start_is_refused_and_names_the_first(tmp_path):
    with storage.lock(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()}"), storage.lock(tmp_path):
        raise AssertionError("two holders")
    with storage.lock(tmp_path):
        pass


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path):
    code = """
import sys, time
from moalign import storage
with storage.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"process {holder.pid}"), storage.lock(tmp_path):
        raise AssertionError("two holders")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with storage.lock(tmp_path):
        assert (tmp_path / storage.LOCK).read_text() == f"{os.getpid()}\n"
