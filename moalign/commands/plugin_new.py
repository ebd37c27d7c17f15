"""``moalign plugins new``: a package around one plugin, from the files in the folder templates."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

from rich.console import Console

from moalign import storage
from moalign.errors import ConfigError, RunError, UnknownPluginError
from moalign.registry import Registry

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST_NAME = 30


def write(name: str, kind: str, parent: Path, installed: Registry) -> None:
    """Write ``parent``/moalign-NAME and say what to do with it.

    Raises ConfigError for a name that no plugin can have, UnknownPluginError where an installed plugin of this kind
    has it, RunError where the folder exists.
    """
    _check(name, kind, installed)
    folder = parent / f"moalign-{name}"
    if folder.exists():
        raise RunError(f"{folder} exists; it is not overwritten")
    files = render(name, kind)
    for path, text in files.items():
        storage.write_text(folder / path, text)
    console = Console()
    for path in files:
        console.print(folder / path, markup=False, highlight=False, soft_wrap=True)
    text = f"next: cd {shlex.quote(str(folder))}, change the {kind}, pip install --editable '.[test]', pytest"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def render(name: str, kind: str) -> dict[str, str]:
    """Path in the package -> content."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # the output is source code, and every value in it has been checked
    )
    values = {
        "name": name,
        "kind": kind,
        "module": "moalign_" + name.replace("-", "_"),
        "class_name": "".join(map(str.capitalize, f"{name}-{kind}".split("-"))),
        "version": ".".join(metadata.version("moalign").split(".")[:2]),
    }
    template = kind.replace("-", "_")
    sources = {
        "pyproject.toml": "pyproject.toml.jinja",
        "README.md": "README.md.jinja",
        f"{values['module']}.py": f"{template}.py.jinja",
        f"tests/test_{values['module']}.py": f"test_{template}.py.jinja",
    }
    return {path: environment.get_template(source).render(values) for path, source in sources.items()}


def _check(name: str, kind: str, installed: Registry) -> None:
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        rule = f"at most {LONGEST_NAME} lower-case letters, digits and single hyphens, a letter first"
        raise ConfigError(f"NAME: '{name}' cannot be a plugin's name; {rule}{_suggestion(name)}")
    if name.startswith("moalign-") or name == "moalign":
        raise ConfigError(f"NAME: '{name}': the package gets the prefix moalign- by itself; leave it out")
    for entry in installed.of_kind(kind):
        if entry.name == name:
            owner = f"{entry.distribution} {entry.version}"
            raise UnknownPluginError(f"NAME: {kind} '{name}' exists already, in {owner}; choose another name")


def _suggestion(name: str) -> str:
    """``MyLoss`` and ``my_loss`` are meant as ``my-loss``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
    meant = re.sub(r"[^a-z0-9]+", "-", words)[:LONGEST_NAME].strip("-")
    return f"; '{meant}' would do" if NAME.fullmatch(meant) else ""
