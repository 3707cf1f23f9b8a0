"""`genrec inspect`: what an artifact is, what it was made from, and what its codes are like.

It reads and never changes anything. `inspect PATH` looks at an artifact alone and is quick;
`inspect tokens PATH` gathers tokenizer, vectors and interactions for the whole truth about codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from genrec.cli.common import CACHE, JSON, print_json, print_table

if TYPE_CHECKING:
    from genrec.item_index import ItemIndex

MAX_SHOWN = 60
NUM_BRANCHES, NUM_EXAMPLES = 5, 4
PAGE = "tokens.html"
MAPS = ("pca", "tsne")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def inspect(
        what: str = typer.Argument(
            metavar="[tokens] PATH", help="Any folder that genrec wrote, e.g. runs/demo/bundle."
        ),
        path: Path = typer.Argument(None, hidden=True),
        dataset: Path = typer.Option(
            None, "--dataset", help="tokens: prepared data set, for training co-occurrence."
        ),
        vectors: Path = typer.Option(
            None, "--vectors", help="tokens: vectors of the items; default: cached or made again."
        ),
        plots: Path = typer.Option(
            None, "--plots", help="tokens: folder for tokens.html (pictures) and tokens.json."
        ),
        map_method: str = typer.Option("pca", "--map", help="tokens: pca, or tsne (slow)."),
        cache: Path = CACHE,
        as_json: bool = JSON,
    ) -> None:
        """Show what an artifact is; `inspect tokens PATH`: all about the codes of its items."""
        if path is None:
            report = describe(Path(what))
            if as_json:
                print_json(report)
                return
            _print_facts(report)
            if "tokens" in report:
                _print_tokens(report["tokens"])
            return
        found = inspect_tokens(
            what,
            path,
            dataset=dataset,
            vectors=vectors,
            cache=cache,
            plots=plots,
            map_method=map_method,
        )
        if as_json:
            print_json(found)
            return
        from genrec.cli.tokens import print_token_report

        print_token_report(found)
        if plots is not None:
            typer.echo(f"pictures: {plots / PAGE}")


def inspect_tokens(
    what: str,
    path: Path,
    *,
    dataset: Path | None = None,
    vectors: Path | None = None,
    cache: Path | None = None,
    plots: Path | None = None,
    map_method: str = "pca",
) -> dict[str, Any]:
    """Return all figures of an index, and write the pictures where asked for.

    Raises:
        UserError: a word other than "tokens", an unknown map, or no index at `path`.
    """
    from genrec.artifacts import write_json_atomic
    from genrec.errors import UserError

    if what != "tokens":
        raise UserError(
            f"inspect: got {what!r} before the path, expected `genrec inspect PATH` or `genrec "
            "inspect tokens PATH`."
        )
    if map_method not in MAPS:
        raise UserError(f"--map: got {map_method!r}, expected one of {', '.join(MAPS)}.")
    from genrec.pipeline.tokens import gather

    sources = gather(path, dataset=dataset, vectors=vectors, cache=cache)
    report = {"path": str(path), **sources.report()}
    if plots is not None:
        from genrec.evaluation.token_plots import write_token_page

        found = sources.points("tsne" if map_method == "tsne" else "pca")
        firsts = sources.built.index.codes[:, 0]
        points = None if found is None else (found[0], firsts[found[1]])
        write_token_page(
            plots / PAGE, report, usage=sources.usage(), points=points, method=map_method
        )
        write_json_atomic(plots / "tokens.json", report)
    return report


def describe(path: Path) -> dict[str, Any]:
    """Return the facts of an artifact folder as JSON types.

    Raises:
        ArtifactError: not a folder that genrec wrote, edited, or (index) damaged.
    """
    from genrec.artifacts import read_manifest

    manifest = read_manifest(path)
    files = manifest["files"].values()
    report: dict[str, Any] = {
        "path": str(path),
        "kind": manifest["kind"],
        "fingerprint": manifest["fingerprint"],
        "format_version": manifest["format_version"],
        "config": manifest["config"],
        "upstream": manifest["upstream"],
        "facts": {key: _shortened(value) for key, value in manifest["extra"].items()},
        "files": {"count": len(files), "bytes": sum(file["bytes"] for file in files)},
        "made_by": manifest.get("made_by", {}),
    }
    index = path if manifest["kind"] == "index" else path / "index"
    if index.is_dir():
        report["tokens"] = describe_tokens(index)
    return report


def describe_tokens(folder: Path) -> dict[str, Any]:
    """Return levels, prefixes and the biggest branches (with example items) of an index folder."""
    from genrec.item_index import ItemIndex
    from genrec.tokenizers.diagnostics.figures import level_figures, prefix_figures

    index = ItemIndex.load(folder)
    return {
        "index_fingerprint": index.fingerprint,
        "num_items": len(index),
        "num_levels": index.num_levels,
        "codebook_sizes": list(index.codebook_sizes),
        "num_tokens": index.num_tokens,
        "shared_vocabulary": index.shared_vocabulary,
        "levels": level_figures(
            index.codes, index.codebook_sizes, shared_vocabulary=index.shared_vocabulary
        ),
        "prefixes": prefix_figures(index.codes),
        "branches": _branches(index, _titles(folder)),
    }


def _branches(index: ItemIndex, titles: dict[str, str]) -> list[dict[str, Any]]:
    """Return the longest shared prefixes with the most items: what the codes say is alike."""
    import numpy as np

    for length in range(max(1, index.num_levels - 2), 0, -1):
        prefixes, inverse, counts = np.unique(
            index.codes[:, :length], axis=0, return_inverse=True, return_counts=True
        )
        if (counts > 1).any() or length == 1:
            break
    found = []
    for group in np.argsort(-counts, kind="stable")[:NUM_BRANCHES]:
        rows = np.flatnonzero(inverse.reshape(-1) == group)
        examples = [index.item_ids[row] for row in rows[:NUM_EXAMPLES]]
        found.append(
            {
                "prefix": prefixes[group].tolist(),
                "num_items": len(rows),
                "examples": [{"item_id": i, "title": titles.get(i)} for i in examples],
            }
        )
    return found


def _titles(index: Path) -> dict[str, str]:
    """Return titles by item id from a catalogue beside the index, {} where there is none."""
    from genrec.data import Catalog
    from genrec.data.dataset import CATALOG

    for folder in (index.parent, index):
        if (folder / CATALOG).is_file():
            import polars as pl

            catalog = Catalog(pl.read_parquet(folder / CATALOG))
            pairs = zip(catalog.item_ids, catalog.titles, strict=True)
            return {item: title for item, title in pairs if title}
    return {}


def _shortened(value: Any) -> Any:
    """Return a value, or what it is where it is too long to read."""
    if isinstance(value, list) and len(value) > MAX_SHOWN:
        return f"{len(value)} values"
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    return value


def _print_facts(report: dict[str, Any]) -> None:
    files, made_by = report["files"], report["made_by"]
    rows = [
        ("fingerprint", report["fingerprint"]),
        ("files", f"{files['count']} ({files['bytes'] / 1e6:.1f} MB)"),
    ]
    rows += [(f"made from {name}", value) for name, value in report["upstream"].items()]
    rows += [*_flat("", report["facts"]), *_flat("config.", report["config"])]
    rows += [(name, version) for name, version in made_by.get("libraries", {}).items()]
    git = made_by.get("git", {})
    if git.get("commit"):
        rows.append(("commit", git["commit"] + (" (with changes)" if git.get("dirty") else "")))
    typer.echo(f"{report['kind']} at {report['path']}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return nested facts as (dotted name, text) lines."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(f"{prefix}{name}.", value)
        elif isinstance(value, list):
            lines.append((prefix + name, ", ".join(map(str, value))))
        else:
            lines.append((prefix + name, str(value)))
    return lines


def _print_tokens(tokens: dict[str, Any]) -> None:
    from genrec.cli.tokens import print_levels

    title = (
        f"{tokens['num_items']} items, {tokens['num_levels']} levels, "
        f"{tokens['num_tokens']} tokens, index {tokens['index_fingerprint'][:12]}"
    )
    print_levels(tokens, title)
    branches = [
        [
            "-".join(map(str, branch["prefix"])),
            str(branch["num_items"]),
            "; ".join(e["title"] or e["item_id"] for e in branch["examples"]),
        ]
        for branch in tokens["branches"]
    ]
    print_table("Biggest branches", ["prefix", "items", "for example"], branches)
