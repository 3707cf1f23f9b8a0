"""What others build tests with: contract classes to subclass and models with known answers.

Names load on first use; this package is part of the public interface, so that an index, a backbone
or a tokenizer from elsewhere can prove that it keeps the contracts.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "BackboneContract": "genrec.testing.models",
    "ConstraintIndexContract": "genrec.testing.decoding",
    "StepModelContract": "genrec.testing.decoding",
    "TableModel": "genrec.testing.decoding",
    "TokenizerContract": "genrec.testing.tokenizers",
    "brute_force_logprobs": "genrec.testing.decoding",
    "random_index": "genrec.testing.decoding",
    "rank": "genrec.testing.decoding",
}

__all__ = [
    "BackboneContract",
    "ConstraintIndexContract",
    "StepModelContract",
    "TableModel",
    "TokenizerContract",
    "brute_force_logprobs",
    "random_index",
    "rank",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genrec.testing' has no attribute {name!r}")
