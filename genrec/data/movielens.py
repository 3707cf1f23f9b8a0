"""Source `movielens`: the 100K, 1M (and 10M) and "latest" (csv; also 20M, 25M, 32M) layouts.

The layout is recognised by the files in the folder, or in the official zip archive.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator
from typing import Any, Literal

import polars as pl

from genrec.data.catalog import ITEM_ID, TITLE
from genrec.data.formats import ROW, Chunk, delimited
from genrec.data.reading import RawFile
from genrec.data.source import (
    ITEM,
    RATING,
    TIMESTAMP,
    USER,
    Source,
    SourceConfig,
    TimeFormat,
    items_table,
)
from genrec.errors import DataError

_EVENTS = {"u.data": "100k", "ratings.dat": "1m", "ratings.csv": "latest"}
_ITEMS = {"100k": "u.item", "1m": "movies.dat", "latest": "movies.csv"}
_GENRES_100K = (  # the flags at the end of a line of u.item, as u.genre lists them
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)


class MovieLens(Source):
    """Ratings with times, titles with years, genres."""

    class Config(SourceConfig):
        """Nothing but the place."""

        name: Literal["movielens"] = "movielens"

    config: Config

    def files(self) -> list[RawFile]:
        """Return the ratings file and the movies file."""
        ratings, kind = self._find_ratings()
        movies = self._sibling(ratings, _ITEMS[kind])
        return [ratings, *([movies] if movies else [])]

    @property
    def time_format(self) -> TimeFormat:
        """All releases count seconds."""
        return "s"

    def facts(self) -> dict[str, Any]:
        """Return which layout was found."""
        return {"layout": self._find_ratings()[1]}

    def events(self, *, with_rating: bool) -> Iterator[Chunk]:
        """See `Source.events`."""
        file, kind = self._find_ratings()
        wanted = [USER, ITEM, TIMESTAMP, *([RATING] if with_rating else [])]
        names = [USER, ITEM, RATING, TIMESTAMP]
        if kind == "latest":
            raw = {USER: "userId", ITEM: "movieId", TIMESTAMP: "timestamp", RATING: "rating"}
            for chunk in delimited(file, columns=[raw[name] for name in wanted]):
                columns = [pl.col(raw[name]).alias(name) for name in wanted]
                yield Chunk(chunk.frame.select(ROW, *columns), chunk.broken)
        else:
            separator = "\t" if kind == "100k" else "::"
            yield from delimited(
                file, separator=separator, quotes=False, names=names, columns=wanted
            )

    def items(self, wanted: Collection[str]) -> pl.DataFrame | None:
        """See `Source.items`."""
        ratings, kind = self._find_ratings()
        movies = self._sibling(ratings, _ITEMS[kind])
        if movies is None:
            return None
        keep = set(wanted)
        rows = (row for row in _movies(movies, kind) if row[ITEM_ID] in keep)
        return items_table(rows)

    def _find_ratings(self) -> tuple[RawFile, str]:
        path = self.config.path
        if path.is_file() and path.suffix.lower() == ".zip":
            for member in _members(path):
                base = member.rsplit("/", 1)[-1]
                if base in _EVENTS:
                    return RawFile(path, member), _EVENTS[base]
        elif path.is_file() and path.name in _EVENTS:
            return RawFile(path), _EVENTS[path.name]
        elif path.is_dir():
            inner = [p for p in sorted(path.iterdir()) if p.is_dir()]
            for folder in [path, *inner]:  # an archive unpacked into a folder of its own
                for name, kind in _EVENTS.items():
                    if (folder / name).is_file():
                        return RawFile(folder / name), kind
        elif not path.exists():
            RawFile(path).check()
        raise DataError(
            f"{str(path)!r} holds no MovieLens ratings. Expected a folder or the official .zip "
            f"archive with {', '.join(_EVENTS)}."
        )

    def _sibling(self, ratings: RawFile, name: str) -> RawFile | None:
        if ratings.member is not None:
            member = ratings.member.rsplit("/", 1)[0] + "/" + name
            member = member if "/" in ratings.member else name
            return RawFile(ratings.path, member) if member in _members(ratings.path) else None
        path = ratings.path.with_name(name)
        return RawFile(path) if path.is_file() else None


def _members(path: Any) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{str(path)!r} is not a whole zip archive ({error}). Download it again."
        ) from None


def _movies(file: RawFile, kind: str) -> Iterator[dict[str, Any]]:
    if kind == "100k":
        head = [ITEM_ID, TITLE, "released", "video_released", "url"]
        names: list[str] | None = [*head, *_GENRES_100K]
        chunks = delimited(file, separator="|", quotes=False, encoding="latin-1", names=names)
    elif kind == "1m":
        names = [ITEM_ID, TITLE, "genres"]
        chunks = delimited(file, separator="::", quotes=False, encoding="latin-1", names=names)
    else:
        chunks = delimited(file, columns=["movieId", "title", "genres"])
    for chunk in chunks:
        if chunk.broken:
            bad = chunk.broken[0]
            raise DataError(f"{file.name}: row {bad.row}: {bad.reason}. Copy the file again.")
        for row in chunk.frame.iter_rows(named=True):
            if kind == "100k":
                genres = [genre for genre in _GENRES_100K if row[genre] == "1"]
            else:
                genres = (row["genres"] or "").split("|")
            yield {
                ITEM_ID: row.get(ITEM_ID) or row.get("movieId"),
                TITLE: row[TITLE],
                "genres": [g for g in genres if g not in ("", "unknown", "(no genres listed)")],
            }
