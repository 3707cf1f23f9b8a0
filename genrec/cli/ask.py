"""`genrec ask`: ask a bundle with a language model in words, from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer

from genrec.cli.common import DEVICE, JSON, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def ask(
        bundle: Path = typer.Argument(help="Bundle of a model on a language model."),
        query: str = typer.Option(None, "--query", help="What is looked for, in words."),
        history: str = typer.Option("", "--history", help="Item ids, oldest first: 50,181,174."),
        titles: str = typer.Option(
            None, "--titles", help="Let the model write titles: tree, bm25 or distance."
        ),
        data: Path = typer.Option(
            None, "--data", help="Dataset folder whose training users are shown to the model."
        ),
        shots: int = typer.Option(0, "--shots", help="With --titles: training users to show."),
        k: int = typer.Option(10, "-k", help="List length."),
        base: str = typer.Option(None, "--base", help="Where the language model lies now."),
        device: str = DEVICE,
        as_json: bool = JSON,
    ) -> None:
        """Print items that a language model answers a query or a history with."""
        from genrec.asking import Asker
        from genrec.recommender import Recommender

        recommender = Recommender.from_pretrained(bundle, device=device, base=base)
        asker = Asker(recommender.model, recommender.catalog, base=base)  # type: ignore[arg-type]
        asked = [part.strip() for part in history.split(",") if part.strip()]
        rows = recommender.index.rows_of(asked)
        if titles is None:
            found, scores, texts = _semantic_ids(asker, recommender.index, query, rows, k)
        else:
            found, scores, texts = _titles(asker, titles, data, shots, rows, k, query)
        items = [
            {"item_id": recommender.index.item_ids[row], "score": score}
            for row, score in zip(found.tolist(), scores.tolist(), strict=True)
            if row >= 0
        ]
        names = recommender.titles([item["item_id"] for item in items])
        items = [{**item, "title": name} for item, name in zip(items, names, strict=True)]
        if as_json:
            print_json({"query": query, "history": asked, "written": list(texts), "items": items})
            return
        for text in texts:
            typer.echo(f"written: {text}")
        lines = [[i["item_id"], i["title"] or "", f"{i['score']:.3f}"] for i in items]
        print_table(query or f"After {len(asked)} items", ["item", "title", "score"], lines)


def _semantic_ids(asker: Any, index: Any, query: str | None, rows: np.ndarray, k: int) -> Any:
    from genrec.decoding import CSRIndex
    from genrec.errors import UserError

    if query is None and not len(rows):
        raise UserError("ask: got neither --query nor --history, expected at least one of them.")
    values: dict[str, Any] = {"history": asker.history(rows)} if len(rows) else {}
    task = "sequential" if query is None else "item_search"
    if query is not None:
        values["query"] = query
    constraint = CSRIndex.from_index(index).to(asker.model.device)
    lists = asker.items([asker.word(task, values)], constraint, k=k, exclude=[rows])
    return lists.rows[0], lists.logprobs[0], ()


def _titles(
    asker: Any,
    grounding: str,
    data: Path | None,
    shots: int,
    rows: np.ndarray,
    k: int,
    query: str | None,
) -> Any:
    from genrec.config import parse
    from genrec.data import Dataset
    from genrec.errors import UserError
    from genrec.titles import TitleConfig, TitleRecommender

    if query is not None:
        raise UserError("ask: got --query with --titles, expected --history. Leave --titles out.")
    config = parse(TitleConfig, {"grounding": grounding, "num_demonstrations": shots})
    training = None if data is None else Dataset.load(data).interactions.training()
    recommender = TitleRecommender(asker, training, config)
    lists = recommender.recommend([rows], k, exclude_seen=True)
    return lists.rows[0], lists.scores[0], lists.texts[0]
