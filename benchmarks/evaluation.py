"""How much time and memory does evaluation take: metrics of many lists, and a search for all users?

Three jobs, each in a process of its own, whose high-water mark of resident memory is taken:

- `metrics`: per-user recall, NDCG and MRR of long lists;
- `lists`: everything in results.json beside accuracy, of the top 10 of the same lists;
- `search`: the lists of every user of a data set as large as Amazon Beauty at beam 50 (fresh
  weights: what they are does not change the work), their metrics, and the per-user file.

Peers: the plainest loop over users for accuracy (on a part of them), and limits for the rest. CPU
seconds are compared, on one thread; wall seconds are among the details.

    python -m benchmarks.evaluation [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp

from benchmarks import common
from benchmarks.data import peak_mb
from genrec.artifacts import load_artifact
from genrec.data import Catalog, Dataset, Examples, Interactions
from genrec.evaluation import beyond_accuracy, list_content, metrics

ITEMS, LABELS, WIDTH, HISTORY = 12_101, 20, 64, 8
USERS, QUICK_USERS, DEPTH = 1_000_000, 5_000, 100
SEARCHED, QUICK_SEARCHED, BEAM = 22_363, 64, 50
LOOPED = 20_000
SECONDS_LIMIT, MEMORY_LIMIT_MB = 60.0, 2_000.0
KS = (10, 100)
MODEL = {"name": "decoder_only", "max_history": 20}


def random_lists(num_users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return lists (U, 100) int32, popular items more often, and targets (U,), a third of hits."""
    rng = np.random.default_rng(seed)
    rows = (ITEMS * rng.random((num_users, DEPTH), dtype=np.float32) ** 2).astype(np.int32)
    rows = np.minimum(rows, ITEMS - 1)
    hit = rows[np.arange(num_users), rng.integers(0, DEPTH, num_users)]
    other = rng.integers(0, ITEMS, num_users)
    return rows, np.where(rng.random(num_users) < 1 / 3, hit, other)


def plain_metrics(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return recall@k and NDCG@k of both k by a loop over users, (4, U)."""
    found = []
    for listed, target in zip(rows.tolist(), targets.tolist(), strict=True):
        rank = listed.index(target) if target in listed else None
        hits = [rank is not None and rank < k for k in KS]
        gains = [1 / np.log2(rank + 2) if hit and rank is not None else 0.0 for hit in hits]
        found.append([*map(float, hits), *gains])
    return np.array(found).T


def fast_metrics(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the same from genrec."""
    found = metrics.list_metrics(rows, targets, KS)
    return np.stack([found[f"{name}@{k}"] for name in ("recall", "ndcg") for k in KS])


def metrics_job(num_users: int) -> dict[str, Any]:
    """Time accuracy of all lists, and of a part of them beside the loop."""
    rows, targets = random_lists(num_users)
    before = peak_mb()
    cpu, wall = common.timed(lambda: metrics.list_metrics(rows, targets, KS))
    part, wanted = rows[:LOOPED], targets[:LOOPED]
    ours, theirs = common.alternate(
        lambda: fast_metrics(part, wanted), lambda: plain_metrics(part, wanted), runs=3
    )
    equal = bool(np.allclose(fast_metrics(part, wanted), plain_metrics(part, wanted)))
    loop = {"ours_s": ours.cpu, "theirs_s": theirs.cpu, "users": len(part), "equal": equal}
    return {"cpu_s": cpu, "wall_s": wall, "input_mb": before, "loop": loop}


def lists_job(num_users: int) -> dict[str, Any]:
    """Time what stands beside accuracy, figure by figure and together."""
    rows, targets = random_lists(num_users)
    rng = np.random.default_rng(1)
    offsets = np.arange(num_users + 1, dtype=np.int64) * HISTORY
    flat = rng.integers(0, ITEMS, num_users * HISTORY)
    people = Examples(np.arange(num_users), targets, flat, offsets)
    has = sp.random_array((ITEMS, LABELS), density=0.12, rng=rng, format="csr", dtype=np.float32)
    has.data[:] = 1
    labels = list_content.ItemAttributes("genres", [str(a) for a in range(LABELS)], has)
    around = beyond_accuracy.Surroundings(
        people,
        np.bincount(flat, minlength=ITEMS),
        labels,
        rng.normal(size=(ITEMS, WIDTH)).astype(np.float32),
        rng.integers(0, 24, (ITEMS, 3)),
    )
    before = peak_mb()
    top = rows[:, :10]
    parts: dict[str, Callable[[], Any]] = {
        "attribute_diversity": lambda: list_content.attribute_diversity(top, labels),
        "vector_diversity": lambda: list_content.vector_diversity(top, around.vectors_NE),  # type: ignore[arg-type]
        "calibration_miss": lambda: list_content.calibration_miss(top, people, labels),
        "semantic_id_level": lambda: beyond_accuracy.semantic_id_figures(rows, around, KS),
        "groups": lambda: beyond_accuracy.group_tables(
            metrics.list_metrics(rows, targets, (10,)), around, num_samples=200
        ),
    }
    seconds = {name: common.timed(part)[0] for name, part in parts.items()}
    cpu, wall = common.timed(lambda: beyond_accuracy.list_figures(rows, around))
    return {"cpu_s": cpu, "wall_s": wall, "input_mb": before, "parts_cpu_s": seconds}


def search_job(num_users: int) -> dict[str, Any]:
    """Search for every user and write the per-user values, as a run does."""
    from genrec.bundle import build_model, save_model
    from genrec.item_index import ItemIndex
    from genrec.pipeline import listing
    from genrec.pipeline.processes import make_accelerator

    common.one_thread()
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(ITEMS)]
    numbers = rng.choice(256**3, ITEMS, replace=False)
    codes = np.stack([numbers // 256**2, numbers // 256 % 256, numbers % 256], axis=1)
    index = ItemIndex(ids, codes.astype(np.int32), (256, 256, 256))
    length = HISTORY + 1
    events = Interactions(
        rng.integers(0, ITEMS, num_users * length).astype(np.int32),
        np.arange(num_users + 1, dtype=np.int64) * length,
        np.zeros(num_users * length, np.int64),
        np.tile(np.array([0] * (length - 2) + [1, 2], np.uint8), num_users),
        ITEMS,
    )
    dataset = Dataset(Catalog(pl.DataFrame({"item_id": ids})), events, {"name": "random"}, "random")
    with tempfile.TemporaryDirectory(prefix="genrec-benchmark-") as name:
        folder = Path(name)
        model = save_model(folder / "model", build_model(MODEL, index, seed=0), index)
        before, begun = peak_mb(), time.perf_counter()
        cpu = time.process_time()
        listing.make_lists(
            folder / "lists",
            dataset,
            index,
            model,
            split="test",
            masked=True,
            width=BEAM,
            scoring="renormalized",
            batch_size=64,
            accelerator=make_accelerator(device="cpu"),
        )
        lists = load_artifact(folder / "lists", kind="lists")
        values = listing.list_values(lists, (5, 10))
        pl.DataFrame(values).write_parquet(folder / "per_user.parquet")
        size = (folder / "per_user.parquet").stat().st_size / 1e6
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - begun,
        "before_mb": before,
        "per_user_mb": size,
        "users": num_users,
    }


JOBS: dict[str, Callable[[int], dict[str, Any]]] = {
    "metrics": metrics_job,
    "lists": lists_job,
    "search": search_job,
}


def measure(job: str, num_users: int) -> dict[str, Any]:
    """Run one job in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--child", job]
    environment = {**os.environ, "GENREC_PROGRESS": "0"}
    command += ["--users", str(num_users)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{job} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all jobs; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--child", choices=list(JOBS), help="used by the benchmark itself")
    parser.add_argument("--users", type=int, help="used by the benchmark itself")
    arguments = parser.parse_args(argv)
    if arguments.child:
        figures = {**JOBS[arguments.child](arguments.users), "peak_mb": peak_mb()}
        sys.stdout.write(json.dumps(figures) + "\n")
        return {}
    users = QUICK_USERS if arguments.quick else USERS
    searched = QUICK_SEARCHED if arguments.quick else SEARCHED
    counts = {"metrics": users, "lists": users, "search": searched}
    found = {job: measure(job, number) for job, number in counts.items()}
    loop = found["metrics"]["loop"]
    ratio = loop["theirs_s"] / loop["ours_s"]
    case = f"accuracy of {loop['users']:,} users x {DEPTH}"
    rows = [
        common.Row(
            case, "python_loop", loop["ours_s"], loop["theirs_s"], ratio, "cpu_s", loop["equal"]
        )
    ]
    names = {
        "metrics": f"accuracy of {users:,} users x {DEPTH}",
        "lists": f"beyond accuracy of {users:,} users x 10",
        "search": f"search for {searched:,} users, beam {BEAM}, {ITEMS:,} items",
    }
    for job in ("metrics", "lists"):
        rows.append(_limit(names[job], found[job], "cpu_s", SECONDS_LIMIT))
    rows.append(_limit(names["search"], found["search"], "peak_mb", MEMORY_LIMIT_MB))
    return common.report(rows, arguments.json)


def _limit(case: str, figures: dict[str, Any], key: str, limit: float) -> common.Row:
    """Compare a figure with its limit; `equal` says whether it was kept."""
    value = figures[key]
    return common.Row(case, "limit", value, limit, limit / value, key, value < limit, figures)


if __name__ == "__main__":
    main()
