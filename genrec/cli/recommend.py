"""`genrec recommend`: ask a bundle from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from genrec.cli.common import DEVICE, JSON, print_json, print_table
from genrec.errors import UserError

if TYPE_CHECKING:
    from genrec.recommender import Recommendations, Recommender


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seconds(text: str) -> list[float]:
    try:
        return [float(part) for part in _ids(text)]
    except ValueError:
        raise UserError(
            f"--times: got {text!r}, expected seconds since 1970 with commas between them, one for "
            "each item of --history, 0 where not known."
        ) from None


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
        times: list[str] = typer.Option(
            None,
            "--times",
            help="Seconds since 1970 of the history's items, 0 where not known: "
            "881250949,881250991. For models trained with times; repeat like --history.",
        ),
        now: list[float] = typer.Option(
            None, "--now", help="Seconds since 1970 of the request; repeat like --history."
        ),
        who: list[str] = typer.Option(
            None, "--user", help="Who asks, as the training data calls them; repeat like --history."
        ),
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
            times=[_seconds(text) for text in times] if times else None,
            now=now or None,
            users=who or None,
        )
        users: list[dict[str, Any]] = [
            {
                "history": asked,
                "certified": bool(found.certified[i]),
                **_strengths(found, i),
                "items": _entries(recommender, found, i),
            }
            for i, asked in enumerate(histories)
        ]
        if as_json:
            print_json(users)
            return
        for user in users:
            asked, items = user["history"], user["items"]
            known = recommender.index.rows_of(asked, missing="skip")
            ids = [recommender.index.item_ids[row] for row in known]
            titles = [t or i for t, i in zip(recommender.titles(ids), ids, strict=True)]
            heading = "After " + (" > ".join(titles[-5:]) or "an empty history")
            note = "exact top list" if user["certified"] else "beam search"
            rows = [
                [e["item_id"], e["title"] or "", f"{e['probability']:.2%}", f"{e['score']:.3f}"]
                for e in items
            ]
            print_table(f"{heading} ({note})", ["item", "title", "probability", "score"], rows)
            typer.echo(_sentence(user))


def _strengths(found: Recommendations, i: int) -> dict[str, float | None]:
    strength = found.preference_strength
    return {
        "expected_hits": float(found.expected_hits[i]),
        "preference_strength": None if strength is None else float(strength[i]),
    }


def _sentence(user: dict[str, Any]) -> str:
    strength = user["preference_strength"]
    shown = "not known" if strength is None else f"{strength:.3f}"
    return (
        f"Expected hits in this list: {user['expected_hits']:.3f}. Preference strength: {shown} "
        "(0 = a blind guess, 1 = certain)."
    )


def _entries(recommender: Recommender, found: Recommendations, i: int) -> list[dict[str, Any]]:
    ids = [item for item in found.item_ids[i] if item is not None]
    return [
        {
            "item_id": item,
            "title": title,
            "score": float(found.scores[i, j]),
            "probability": float(found.probabilities[i, j]),
        }
        for j, (item, title) in enumerate(zip(ids, recommender.titles(ids), strict=True))
    ]
