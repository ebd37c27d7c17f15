"""The methods that ship with moalign: one method per file, in the folder of its kind; deleting the file removes the
method. Files with a leading underscore hold what several share.

They come in through the same door as a stranger's: this module is an entry point of the group ``moalign``. What it
registers stands in the files, as ``REGISTRATION``: a dictionary of literals, which is read from the source. So a method
is there because its file is there, and neither it nor torch is imported until somebody uses it.
"""

import ast
import re
from pathlib import Path
from typing import Any

from moalign.api import PluginError, Register, hookimpl

HERE = Path(__file__).parent
BLOCK = re.compile(r"^REGISTRATION = (\{$.*?^\})$", re.MULTILINE | re.DOTALL)


@hookimpl
def register_objectives(register: Register) -> None:
    _register_files("objectives", register)


@hookimpl
def register_combiners(register: Register) -> None:
    _register_files("combiners", register)


@hookimpl
def register_rewards(register: Register) -> None:
    _register_files("rewards", register)


@hookimpl
def register_transforms(register: Register) -> None:
    _register_files("transforms", register)


@hookimpl
def register_searches(register: Register) -> None:
    _register_files("searches", register)


@hookimpl
def register_readers(register: Register) -> None:
    _register_files("readers", register)


@hookimpl
def register_observers(register: Register) -> None:
    _register_files("observers", register)


@hookimpl
def register_decoders(register: Register) -> None:
    _register_files("decoders", register)


@hookimpl
def register_conditioners(register: Register) -> None:
    _register_files("conditioners", register)


@hookimpl
def register_reward_models(register: Register) -> None:
    _register_files("reward_models", register)


@hookimpl
def register_references(register: Register) -> None:
    _register_files("references", register)


@hookimpl
def register_filters(register: Register) -> None:
    _register_files("filters", register)


def _register_files(folder: str, register: Register) -> None:
    """A file whose name begins with an underscore holds what several methods share."""
    for file in sorted((HERE / folder).glob("[!_]*.py")):
        entry = _registration(file)
        register(target=f"{__name__}.{folder}.{file.stem}:{entry.pop('class')}", **entry)


def _registration(file: Path) -> dict[str, Any]:
    """Only the dictionary is parsed: every command reads all the files."""
    found = BLOCK.search(file.read_text(encoding="utf-8"))
    if found is None:
        raise PluginError(
            f"{file} has no lines from 'REGISTRATION = {{' to '}}' at their left edge, with name and class"
        )
    return ast.literal_eval(found[1])
