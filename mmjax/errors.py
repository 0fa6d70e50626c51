"""Errors meant for the person at the keyboard: one line, the place, and what to do."""

from __future__ import annotations


class MmjaxError(Exception):
    """An error whose message is complete without a traceback; the command line prints it and exits 2."""


class ConfigError(MmjaxError, ValueError):
    """A configuration has a field that is missing, unknown, or out of range."""


class CheckpointError(MmjaxError, ValueError):
    """A checkpoint or a hub folder cannot be read or written as asked."""


class DataError(MmjaxError, ValueError):
    """Input data is not what the pipeline was told to expect."""


class TrainingError(MmjaxError, RuntimeError):
    """A run cannot start, go on, or be resumed."""
