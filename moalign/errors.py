"""The few kinds of error. Every message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class MoalignError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UserError(MoalignError):
    """The input was wrong; nothing was trained and nothing was lost."""

    exit_code = 2


class ConfigError(UserError):
    """A key of the configuration is unknown, missing or has a bad value; names the key."""


class PreferenceError(UserError):
    """A preference does not fit the objectives it is meant for; names the objective and the value."""


class DataError(UserError):
    """A data file cannot be understood.

    ``file`` and ``line`` (counted from 1; for formats without lines, the row) stand at the front of the message.
    """

    def __init__(self, reason: str, *, file: str | None = None, line: int | None = None):
        self.reason, self.file, self.line = reason, file, line
        place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(place + reason)


class ModelError(UserError):
    """A model or tokenizer directory cannot be used as it is; names the directory and the reason."""


class PluginError(MoalignError):
    """A plugin is unknown, ambiguous, broken or returned something it must not; names plugin and distribution."""


class UnknownPluginError(PluginError, UserError):
    """The configuration names a plugin that is not installed, is disabled, or is claimed twice."""

    exit_code = 2


class RunError(UserError):
    """A run directory is locked, incomplete or does not belong to this configuration; names the directory."""


class NoSpaceError(RunError):
    """The disk is full. What was finished stands; names the path."""

    exit_code = 1


class CorruptFileError(MoalignError):
    """A file of a run directory is not what was written there; names the file."""


class TrainingError(MoalignError):
    """A candidate could not be trained (non-finite numbers, out of memory); the rest of the sweep goes on."""
