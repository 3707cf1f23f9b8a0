"""genrec: generative recommendation built around item tokenization.

Public names load on first use, so that `import genrec` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Catalog": "genrec.data",
    "Dataset": "genrec.data",
    "Interactions": "genrec.data",
    "ItemIndex": "genrec.item_index",
    "Recommender": "genrec.recommender",
    "Recommendations": "genrec.recommender",
}

__all__ = ["Catalog", "Dataset", "Interactions", "ItemIndex", "Recommendations", "Recommender"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
