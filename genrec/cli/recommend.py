"""`genrec recommend`: ask a bundle from the shell."""

from __future__ import annotations

from pathlib import Path

import typer

from genrec.cli.common import DEVICE, JSON, print_json, print_table


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def recommend(
        bundle: Path = typer.Argument(help="Bundle folder, e.g. runs/demo/bundle."),
        history: list[str] = typer.Option(
            [""], "--history", help="Item ids, oldest first: 50,181,174. Repeat for more users."
        ),
        k: int = typer.Option(10, "-k", help="List length."),
        candidates: str = typer.Option(None, "--candidates", help="The only items to rank."),
        exclude: str = typer.Option(None, "--exclude", help="Items to leave out."),
        rule: str = typer.Option(
            None,
            "--rule",
            help="The only items that may be listed: an expression over the catalogue's columns, "
            'e.g. "year >= 1990 and title is not null".',
        ),
        keep_seen: bool = typer.Option(False, "--keep-seen", help="Keep the history's items in."),
        width: int = typer.Option(None, "--width", help="Beam width; default the bundle's."),
        missing: str = typer.Option(
            "skip", "--missing", help="Unknown items in a history: skip or error."
        ),
        device: str = DEVICE,
        as_json: bool = JSON,
    ) -> None:
        """Print the most likely next items of a history, with calibrated probabilities."""
        from genrec.recommender import Recommender

        recommender = Recommender.from_pretrained(bundle, device=device)
        histories = [_ids(text) for text in history]
        found = recommender.recommend(
            histories,
            k,
            candidates=_ids(candidates) if candidates is not None else None,
            exclude=_ids(exclude) if exclude is not None else None,
            exclude_seen=not keep_seen,
            rule=rule,
            width=width,
            missing=missing,  # type: ignore[arg-type]
        )
        lists = [_entries(recommender, found, i) for i in range(len(histories))]
        if as_json:
            print_json(
                [
                    {"history": asked, "certified": bool(certain), "items": items}
                    for asked, certain, items in zip(histories, found.certified, lists, strict=True)
                ]
            )
            return
        for asked, certain, items in zip(histories, found.certified, lists, strict=True):
            known = recommender.index.rows_of(asked, missing="skip")
            ids = [recommender.index.item_ids[row] for row in known]
            titles = [t or i for t, i in zip(recommender.titles(ids), ids, strict=True)]
            heading = "After " + (" > ".join(titles[-5:]) or "an empty history")
            note = "exact top list" if certain else "beam search"
            rows = [
                [e["item_id"], e["title"] or "", f"{e['probability']:.2%}", f"{e['score']:.3f}"]
                for e in items
            ]
            print_table(f"{heading} ({note})", ["item", "title", "probability", "score"], rows)


def _entries(recommender: object, found: object, i: int) -> list[dict]:
    ids = [item for item in found.item_ids[i] if item is not None]  # type: ignore[attr-defined]
    return [
        {
            "item_id": item,
            "title": title,
            "score": float(found.scores[i, j]),  # type: ignore[attr-defined]
            "probability": float(found.probabilities[i, j]),  # type: ignore[attr-defined]
        }
        for j, (item, title) in enumerate(zip(ids, recommender.titles(ids), strict=True))  # type: ignore[attr-defined]
    ]
