"""Distributions as pip leaves them: a module, and a dist-info folder with the entry point."""

from __future__ import annotations

from pathlib import Path

GOOD = '''
from moalign.api import Objective, hookimpl, pair_logits

class Good(Objective):
    """A squared loss."""
    needs = frozenset({"pairs", "reference"})
    beta: float = 0.1
    """how strong"""
    def loss(self, batch, terms):
        return (1 - pair_logits(batch, terms, self.beta)) ** 2

@hookimpl
def register_objectives(register):
    register("{name}", "{module}:Good", summary="a squared loss", paper="arXiv:0000.00000")
'''


def install(folder: Path, name: str, source: str, version: str = "1.0", group: str = "moalign") -> None:
    """``source`` is the text of the module; {name} and {module} in it stand for the two."""
    module = name.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source.replace("{name}", name).replace("{module}", module))
    register(folder, name, module, version, group)


def register(folder: Path, name: str, module: str, version: str = "1.0", group: str = "moalign") -> None:
    """The dist-info folder alone."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
