"""How does one tokenizer hold another as a part? Its section in the configuration, its seed and its
arrays; what the outer one does with the codes is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrec.config import parse_component
from genrec.errors import ConfigError
from genrec.tokenizers import TOKENIZERS
from genrec.tokenizers.base import ItemTokenizer

SEPARATOR = "/"
PLACE = "part"


def complete_part(section: Any, *, default: str) -> dict[str, Any]:
    """Return a part's section with every setting, checked.

    For a validator of the outer configuration: messages say where below the section, and `parse`
    puts the section's own path before it.

    Args:
        section: a name, or a mapping as in YAML.
        default: name of the tokenizer where a mapping has none.

    Raises:
        ConfigError: unknown name or key, a value out of range, or a tokenizer whose levels share a
            vocabulary: its semantic IDs end anywhere, a part's may not.
    """
    if isinstance(section, Mapping):
        section = {"name": default, **section}
    try:
        found, config = parse_component(TOKENIZERS, section, path=PLACE)
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(line.removeprefix(f"{PLACE}.") for line in lines)) from None
    if found.shared_vocabulary is True:
        raise ConfigError(
            f"name: got {config.to_dict()['name']!r}, whose levels share a vocabulary. Expected a "
            f"tokenizer with codes of their own per level, such as {default!r}."
        )
    return config.to_dict()


def make_part(section: Mapping[str, Any], *, path: str, seed: int = 0) -> ItemTokenizer:
    """Return an unfitted part; its own seed, where it has one, is moved by `seed`."""
    cls, config = parse_component(TOKENIZERS, dict(section), path=path)
    own = getattr(config, "seed", None)
    moved = config if own is None else config.model_copy(update={"seed": own + seed})
    part: ItemTokenizer = cls(moved)
    return part


def part_state(part: ItemTokenizer, prefix: str) -> dict[str, np.ndarray]:
    """Return a part's arrays under names of their own."""
    return {f"{prefix}{SEPARATOR}{name}": array for name, array in part.state().items()}


def load_part(part: ItemTokenizer, state: Mapping[str, np.ndarray], prefix: str) -> ItemTokenizer:
    """Give a part the arrays that `part_state` named."""
    start = prefix + SEPARATOR
    arrays = {name[len(start) :]: array for name, array in state.items() if name.startswith(start)}
    return part.load_state(arrays)
