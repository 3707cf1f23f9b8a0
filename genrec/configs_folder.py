"""Where the ready configurations are: in the checkout's configs/, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

from genrec.errors import ConfigError, nearest

_PLACES = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


def find_config(name: str, *, key: str = "config") -> Path:
    """Return the path of a ready configuration such as "demo".

    Args:
        name: without folder and ending.
        key: what the name was given as, for the error.

    Raises:
        ConfigError: there is none of that name; lists the names there are.
    """
    folder = next((place for place in _PLACES if (place / "demo.yaml").is_file()), None)
    if folder is None:
        raise ConfigError("no configs/ folder beside this genrec. Install genrec again.")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(
            f"{key}: got {name!r}, expected one of {', '.join(names)}.{nearest(name, names)}"
        )
    return path
