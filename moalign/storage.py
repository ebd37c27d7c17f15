"""The only writer to disk: atomic, fsynced, checksummed, no pickle.

A file appears under its name whole or not at all, and the same holds for a folder. Everything that is read back says
by itself whether it is what was written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moalign import disk
from moalign.errors import CorruptFileError, MoalignError, RunError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
LOCK = ".lock"
TEMPORARY = ".partial-"  # first letters of everything that is not finished yet

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")
_CHECKSUM_KEY = "sha256"
_NO_CHECKSUM = "0" * 64


def safe_name(name: object) -> bool:
    """Whether ``name`` may be a file's or folder's name: no separators, no leading dot, at most 128 characters."""
    return isinstance(name, str) and _SAFE_NAME.fullmatch(name) is not None


# --- files ----------------------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, whole or not at all, and durably; creates the folders above it.

    Raises RunError naming the path (disk full, read-only, ...); the previous file is then untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with disk.naming(path):
            make_directory(path.parent)
            with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                _write(descriptor, data)
                os.fsync(descriptor)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Like ``write_bytes``, in UTF-8; a lone surrogate is written as its escape, as in a traceback."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: object) -> None:
    """Canonical JSON: sorted keys, indent 2, a newline at the end. NaN and infinity are refused (MoalignError)."""
    try:
        text = canonical_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise MoalignError(f"{path}: this cannot be written as JSON: {error}") from error
    write_bytes(path, text.encode())


def canonical_json(value: object) -> str:
    """The one text that stands for ``value``; equal values have equal text."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def append_bytes(path: str | Path, data: bytes, keep: int | None = None) -> None:
    """Cut ``path`` to its first ``keep`` bytes (None: all of them), append ``data``, fsync.

    Raises RunError naming the path; the file then ends after ``keep`` bytes.
    """
    path = Path(path)
    with disk.naming(path):
        make_directory(path.parent)
        new = not path.exists()
        with _opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            keep = size if keep is None else min(keep, size)
            os.ftruncate(descriptor, keep)
            os.lseek(descriptor, keep, os.SEEK_SET)
            try:
                _write(descriptor, data)
                os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, keep)
                raise
        if new:
            _sync(path.parent)


def read_bytes(path: str | Path) -> bytes:
    """The whole file; RunError when it is not there or cannot be read."""
    with disk.naming(path, "read"):
        return Path(path).read_bytes()


def read_json(path: str | Path) -> Any:
    """Parse a file written by ``write_json``. CorruptFileError naming it when it is not JSON, RunError when absent."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not the JSON that was written here: {error}") from error


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no key twice. Raises ValueError."""
    return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    with disk.naming(path, "read"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- tensors --------------------------------------------------------------------------------------------------------


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device, any stride) as safetensors that other tools load as they are.

    The metadata holds the SHA-256 of the file itself, taken with 64 zeros in its place, so that a single flipped bit
    anywhere is found. The bytes are a function of names, values and metadata alone.
    """
    from safetensors.torch import save

    metadata = {"format": "pt", **(metadata or {})}
    if _CHECKSUM_KEY in metadata or not all(isinstance(text, str) for text in metadata.values()):
        raise MoalignError(f"{path}: metadata must be texts, and '{_CHECKSUM_KEY}' is the checksum's own key")
    raw = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    header, body = _split(raw)
    # The library keeps metadata in a hash map of random order; this order is the alphabet's.
    header["__metadata__"] = dict(sorted({**metadata, _CHECKSUM_KEY: _NO_CHECKSUM}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unsigned = len(text).to_bytes(8, "little") + text + body
    checksum = hashlib.sha256(unsigned).hexdigest()
    write_bytes(path, unsigned.replace(_mark(_NO_CHECKSUM), _mark(checksum), 1))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file written by ``write_tensors``, on the CPU. CorruptFileError when a bit of it differs."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data, _ = _checked(path)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptFileError(f"{path}: not a safetensors file: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file written by ``write_tensors``, without the checksum; checked like the tensors."""
    _, metadata = _checked(path)
    return metadata


def _checked(path: str | Path) -> tuple[bytes, dict[str, str]]:
    data = read_bytes(path)
    try:
        header, _ = _split(data)
        metadata = dict(header["__metadata__"])
        checksum = metadata.pop(_CHECKSUM_KEY)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: cut short, altered, or a safetensors file without a checksum") from error
    unsigned = data.replace(_mark(str(checksum)), _mark(_NO_CHECKSUM), 1)
    if hashlib.sha256(unsigned).hexdigest() != checksum:
        raise CorruptFileError(f"{path}: its content does not match its checksum; restore it or delete it")
    return data, metadata


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("the header is longer than the file")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    return header, data[8 + length :]


def _mark(checksum: str) -> bytes:
    return f'"{_CHECKSUM_KEY}":"{checksum}"'.encode()


# --- folders --------------------------------------------------------------------------------------------------------


def make_directory(path: str | Path) -> None:
    """Create a folder and those above it, durably; nothing happens where it exists."""
    path = Path(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    with disk.naming(path):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Build a folder under a temporary name; at the end it gets its manifest and its name, all or nothing.

    ``with new_directory(run / "checkpoints" / "step-5") as folder: write_json(folder / "state.json", state)``.
    Raises RunError when ``path`` is there and not empty, or something cannot be written, NoSpaceError where the disk is
    full; no trace is left then.
    """
    path = Path(path)
    vacant = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not vacant:
        raise RunError(f"{path} exists already; it is never overwritten, delete it first if it is not wanted")
    make_directory(path.parent)
    temporary = _temporary(path)
    try:
        with disk.naming(path):
            temporary.mkdir()
        with disk.space_for(path):
            yield temporary
        write_manifest(temporary)
        with disk.naming(path):
            os.rename(temporary, path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_manifest(path: str | Path) -> None:
    """Write MANIFEST.json over all files now below ``path`` (names, sizes, SHA-256) once all of them are on disk."""
    path = Path(path)
    files = {}
    for file in _files_below(path):
        with disk.naming(file):
            _sync(file)
            files[file.relative_to(path).as_posix()] = {"sha256": sha256_of(file), "size": file.stat().st_size}
    for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        with disk.naming(folder):
            _sync(folder)
    write_json(path / MANIFEST, _sealed(files))


def verify(path: str | Path, only: Collection[str] | None = None) -> list[str]:
    """Check a folder, or ``only`` these files of it; returns the files that the manifest does not name or vouch for.

    Raises CorruptFileError naming the file that is missing, altered, a link, or lies outside the folder.
    """
    path = Path(path)
    listed = _read_manifest(path)
    for name in sorted(listed.keys() & set(listed if only is None else only)):
        _verify_file(path, name, listed[name])
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    return sorted(present - set(listed) - {MANIFEST})


def leftovers(path: str | Path) -> list[Path]:
    """Remove what a killed process left unfinished anywhere below ``path``; returns it. Only under the run's lock."""
    found = sorted(Path(path).rglob(f"{TEMPORARY}*"))
    for item in found:
        with disk.naming(item):
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink(missing_ok=True)
    return found


def _files_below(path: Path) -> list[Path]:
    items = [item for item in sorted(path.rglob("*")) if item != path / MANIFEST]
    for item in items:
        if item.is_symlink() or not (item.is_file() or item.is_dir()):
            raise RunError(f"{item}: only plain files and folders can be kept, not links or devices")
    return [item for item in items if item.is_file()]


def _sealed(files: Mapping[str, Any]) -> dict[str, Any]:
    return {"files": files, "sha256": hashlib.sha256(canonical_json(files).encode()).hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    if manifest.is_symlink() or not manifest.is_file():
        raise CorruptFileError(f"{manifest} is missing: the folder was not finished, or it was altered")
    data = read_bytes(manifest)
    try:
        files = parse_json(data)["files"]
        whole = data == canonical_json(_sealed(files)).encode()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptFileError(f"{manifest}: not the manifest that was written here") from error
    if not whole or not isinstance(files, dict):
        raise CorruptFileError(f"{manifest}: its content does not match its checksum")
    return files


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name or "/".join(parts) != name:
        raise CorruptFileError(f"{folder / MANIFEST}: the name {name!r} leaves the folder; nothing was read from it")
    if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
        raise CorruptFileError(f"{folder / MANIFEST}: the entry of {name!r} is not a size and a checksum")
    file = folder
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise CorruptFileError(f"{file}: a link stands where a file or folder was written")
    try:
        status = file.stat()
    except OSError as error:
        raise CorruptFileError(f"{file}: the manifest names it but it is missing") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry["size"] or sha256_of(file) != entry["sha256"]:
        raise CorruptFileError(f"{file}: its content is not what was written; restore it from a copy")


# --- the lock -------------------------------------------------------------------------------------------------------


@contextmanager
def lock(run_directory: str | Path) -> Iterator[None]:
    """Hold a run directory for this process alone. RunError naming the holder when it is taken.

    The kernel drops the lock when the process ends, however it ends, so there is no stale lock to clean up.
    """
    path = Path(run_directory) / LOCK
    make_directory(path.parent)
    with ExitStack() as stack:
        with disk.naming(path):
            descriptor = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                raise RunError(f"{run_directory} is in use by process {holder}; wait for it or stop it") from error
            os.ftruncate(descriptor, 0)
            _write(descriptor, f"{os.getpid()}\n".encode())
        yield


# --- primitives -----------------------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}")


def _sync(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result
