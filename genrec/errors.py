"""Exceptions that users see, and the "nearest name" hint. It knows nothing about what raised them.

Every message says what was got, what was expected and what to do. The command line prints a
`GenrecError` as one message and exits with status 2; anything else is a defect of genrec and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GenrecError(Exception):
    """Base of every error that is meant for a user; the command line exits with status 2."""


class UserError(GenrecError, ValueError):
    """An argument or an input that genrec cannot use."""


class ConfigError(UserError):
    """A configuration key or value that is not valid (message starts with the dotted path)."""


class DataError(UserError):
    """Raw data or a dataset folder that cannot be read as what it should be."""


class ArtifactError(UserError):
    """An artifact that is missing, truncated, edited, or of another kind or format."""


class MismatchError(ArtifactError):
    """Two artifacts that do not belong together; the message holds both fingerprints."""


class AssetError(UserError):
    """An optional data set or model that is not on this machine and could not be fetched."""


class TrainingError(UserError):
    """Training that cannot go on (NaN loss, out of memory, nothing to train on)."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
