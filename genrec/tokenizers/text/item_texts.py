"""Which words an identifier is made from: the text of each item, cleaned, with a stand-in for none.

It knows catalogues and strings, neither sub-words nor codes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from genrec.data.catalog import TITLE
from genrec.errors import DataError

if TYPE_CHECKING:
    from genrec.data import Catalog

Missing = Literal["text", "id", "error"]
MAX_NAMED = 5


def item_texts(
    catalog: Catalog,
    columns: Sequence[str] | None,
    *,
    missing: Missing,
    lowercase: bool = False,
    collapse_whitespace: bool = True,
) -> tuple[list[str], list[int]]:
    """Return one text per item, never empty, and the rows that have none of their own.

    Args:
        catalog: M items.
        columns: catalogue columns that make up the text, in order; None takes all.
        missing: what an item without text in these columns gets: its text over all columns ("text")
            or else its id, its id at once ("id"), or an error.
        lowercase: turn capitals into small letters.
        collapse_whitespace: one blank for every run of white space (ends are always stripped).

    Returns:
        M texts in Unicode's composed form (NFC), and the rows that got a stand-in.

    Raises:
        DataError: an unknown column or none at all, or items without text and `missing` is "error".
    """
    if not catalog.columns:
        raise DataError(
            "tokenizer: the catalogue has no columns but item ids, expected titles or other texts. "
            "Prepare the data with an items file, or use a tokenizer that needs no texts."
        )

    def clean(text: str) -> str:
        text = unicodedata.normalize("NFC", text).strip()
        text = " ".join(text.split()) if collapse_whitespace else text
        return text.lower() if lowercase else text

    texts = [clean(text) for text in _column_texts(catalog, columns)]
    bare = [row for row, text in enumerate(texts) if not text]
    if bare and missing == "error":
        shown = ", ".join(repr(catalog.item_ids[row]) for row in bare[:MAX_NAMED])
        raise DataError(
            f"tokenizer: {len(bare)} item(s) have no text in {', '.join(columns or ['any column'])}"
            f", e.g. {shown}. Fill it in, leave these items out, name other tokenizer.columns, or "
            "set tokenizer.missing=text."
        )
    if bare and missing == "text":
        for row, text in zip(bare, catalog.select(bare).texts(), strict=True):
            texts[row] = clean(text)
    for row in bare:
        texts[row] = texts[row] or clean(catalog.item_ids[row]) or repr(catalog.item_ids[row])
    return texts, bare


def _column_texts(catalog: Catalog, columns: Sequence[str] | None) -> list[str]:
    if columns is not None and list(columns) == [TITLE] and TITLE in catalog.columns:
        return [title or "" for title in catalog.titles]
    return catalog.texts(columns)
