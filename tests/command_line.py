"""The command line without five seconds of imports for each command: ``moalign`` in forks of one prepared process, and
with ``-c`` as its first argument a program, as ``python -c`` runs it.

The prepared process has imported the libraries, and nothing of moalign; a fork of it begins as a new interpreter would:
with the caller's arguments, variables, directory, path and standard files. What is true of a process from its very
beginning (what it imports, signals, terminals) is tested with processes of their own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    sent = socket.send_fds(asked, [request], [0, 1, 2])
    asked.sendall(request[sent:])
    asked.shutdown(socket.SHUT_WR)
    status = int(asked.recv(16) or 70)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def moalign(
    *arguments: object,
    cwd: Path | None = None,
    path: tuple[Path, ...] = (),
    stdin: str | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The command's outcome; ``path``: folders in front of PYTHONPATH."""
    search = os.pathsep.join(filter(None, [*map(str, path), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [str(folder() / "moalign"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
        timeout=120,
        env=os.environ | {"PYTHONPATH": search} | environment,
    )


@functools.cache
def folder() -> Path:
    """A folder with a script ``moalign``, for the front of a shell's PATH; the prepared process stands behind it."""
    made = Path(tempfile.mkdtemp(prefix="moalign-tests-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    address = str(made / "asked")
    (made / "client.py").write_text(CLIENT.format(address=address))
    script = made / "moalign"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{made}/client.py" "$@"\n')
    script.chmod(0o755)
    serving = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert serving.stdin is not None and serving.stdout is not None
    assert serving.stdout.readline() == b"ready\n"
    atexit.register(serving.communicate)  # which closes its stdin, and so ends it
    return made


# --- the prepared process -------------------------------------------------------------------------------------------

LIBRARIES = (
    *(
        "accelerate",
        "jinja2",
        "matplotlib.figure",
        "peft",
        "pluggy",
        "pydantic",
        "pymoo.indicators.hv",
        "rich.progress",
    ),
    *("safetensors.torch", "scipy.optimize", "torch", "transformers.models.llama.modeling_llama", "typer", "yaml"),
)
NAMES = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "LogitsProcessorList", "PreTrainedTokenizerFast")


def prepare() -> None:
    """Import what commands import of others; transformers opens a module when a name of it is asked for."""
    for module in LIBRARIES:
        importlib.import_module(module)
    import transformers

    for name in NAMES:
        getattr(transformers, name)


def serve(address: str) -> list[str]:
    """Fork for each request, until stdin ends; returns in a fork alone, with the arguments of its command."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    behind = [place for place in sys.path[1:] if place not in own]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while _asked(listening):
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                request, files = _received(connection)
                child = os.fork()
                if child == 0:
                    connection.close()
                    return _begin(request, files, behind)
                _, status = os.waitpid(child, 0)
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)
            connection.close()
    os._exit(0)


def _asked(listening: socket.socket) -> bool:
    """Wait for a request; False where stdin has ended."""
    import select

    ready, _, _ = select.select([listening, sys.stdin.fileno()], [], [])
    return listening in ready


def _received(connection: socket.socket) -> tuple[Any, list[int]]:
    content, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while more := connection.recv(1 << 16):
        content += more
    return json.loads(content), files


def _begin(request: Any, files: list[int], behind: list[str]) -> list[str]:
    """What a new interpreter finds."""
    arguments, directory, environment = request
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    search = [str(Path(place).absolute()) for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*search, *behind]
    return ["moalign", *arguments]


def run() -> int:
    """The exit status of the command or program."""
    try:
        if sys.argv[1:2] == ["-c"]:
            exec(compile(sys.argv[2], "<string>", "exec"), {"__name__": "__main__"})
        else:
            from moalign.cli import main

            main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """End as an interpreter does, but for taking down all that is imported, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]  # which waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that wait are not waited for
    gc.freeze()  # a fork that collected what it shares would copy it
    sys.argv = serve(sys.argv[1])
    leave(run())
