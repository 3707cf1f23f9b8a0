"""How token figures and new items are printed; `genrec inspect tokens` and `tokenize` share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from genrec.cli.common import print_table

MAX_ITEMS, MAX_LEVELS, MAX_TEXT = 20, 8, 60


def print_token_report(report: Mapping[str, Any]) -> None:
    """Print the figures of `diagnose`: before and after, levels, prefixes, the tree, notes."""
    from genrec.evaluation.token_plots import token_rows

    tokenizer, policy = report.get("tokenizer"), report.get("policy")
    title = f"{report['num_items']:,} items" + (f", tokenizer {tokenizer}" if tokenizer else "")
    typer.echo(title + (f", collisions {policy}" if policy else ""))
    print_table("", ["", "before", "after"], token_rows(report))
    print_levels(report["index"])
    if "cooccurrence" in report["index"]:
        _print_lift(report["index"]["cooccurrence"])
    if report.get("tree"):
        _print_tree(report["tree"])
    for note in report.get("notes", ()):
        typer.echo(note)


def print_levels(side: Mapping[str, Any], title: str = "Levels of the index") -> None:
    """Print usage and sharing per level."""
    columns = ["level", "codes used", "perplexity", "entropy", "prefixes", "largest", "sharing"]
    rows = [
        [
            str(level["level"]),
            f"{level['used']} of {level['codebook_size']}",
            f"{level['perplexity']:.1f}",
            f"{level['entropy']:.3f}",
            str(prefix["num_distinct"]),
            str(prefix["largest_group"]),
            f"{prefix['share_of_items_sharing']:.1%}",
        ]
        for level, prefix in zip(side["levels"], side["prefixes"], strict=True)
    ]
    print_table(title, columns, rows)


def _print_lift(figures: Mapping[str, Any]) -> None:
    rows = [
        [
            str(prefix["length"]),
            f"{prefix['num_pairs']:,}",
            "" if prefix["lift"] is None else f"{prefix['lift']:.2f}x",
        ]
        for prefix in figures["prefixes"]
        if prefix["num_pairs"]
    ]
    typer.echo("Consumed by the same users: pairs that share codes against all pairs")
    print_table("", ["codes shared", "pairs", "co-occurrence"], rows)


def _print_tree(branches: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def grow(tree: Tree, parts: Sequence[Mapping[str, Any]]) -> None:
        for branch in parts:
            examples = [e["title"] or e["item_id"] for e in branch["examples"]]
            prefix = "-".join(map(str, branch["prefix"]))
            line = f"{prefix}  {branch['num_items']} item(s): {'; '.join(examples)}"
            grow(tree.add(Text(line, no_wrap=True, overflow="ellipsis")), branch["children"])

    tree = Tree("Biggest branches")
    grow(tree, branches)
    Console().print(tree)


def print_added(report: Mapping[str, Any]) -> None:
    """Print what `add_items` returned."""
    print_table(
        f"{report['num_added']} item(s) added to {report['path']}, now {report['num_items']:,} "
        f"(index {report['index_fingerprint'][:12]}, collisions {report['policy']})",
        ["item", "codes", "distance", "farther than", "title"],
        [_added(entry) for entry in report["items"][:MAX_ITEMS]],
    )
    if report["num_added"] > MAX_ITEMS:
        typer.echo(f"... and {report['num_added'] - MAX_ITEMS} more (--json lists all)")
    if report["refused"]:
        rows = [[entry["item_id"], entry["reason"]] for entry in report["refused"]]
        print_table(f"{len(rows)} item(s) left out", ["item", "why"], rows)
    drift = report["drift"]
    typer.echo(
        drift["sentence"]
        if drift
        else "Codes of this tokenizer do not stand for vectors: nothing to say about drift."
    )


def _added(entry: Mapping[str, Any]) -> list[str]:
    codes = entry["codes"]
    shown = "-".join(map(str, codes[:MAX_LEVELS])) + ("-..." if len(codes) > MAX_LEVELS else "")
    distance, percentile = entry.get("distance"), entry.get("percentile")
    return [
        entry["item_id"],
        shown,
        "" if distance is None else f"{distance:.3f}",
        "" if percentile is None else f"{percentile:.0f}%",
        (entry["title"] or "")[:MAX_TEXT],
    ]
