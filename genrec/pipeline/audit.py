"""Does anything that is fitted know the held-out items? Every stage is fitted twice to find out.

The items of validation and test interactions are replaced; users, order and times stay. A stage
that sees training interactions only must then leave exactly the same arrays. Each stage gets the
*unaltered* results of the stages before it, so that only the one that leaks is named. Stages run
through `Run`, as in a real run, but in empty caches, so that nothing is taken from an earlier fit.

Two stages see validation targets, as they should: training stops by them (a trained baseline's
too), and calibration is fitted on them. These are checked with test items replaced only. Weights
are checked with all held-out items replaced too, after one epoch, when there is nothing to select.

What it cannot find: a leak that is in the data already (a column computed from all interactions,
filters such as k-core that count held-out ones), or in files and pretrained models made elsewhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genrec import runtime
from genrec.artifacts import Artifact, fingerprint
from genrec.bundle import mode_name
from genrec.data import Catalog, Dataset, Interactions
from genrec.data.interactions import TEST, TRAIN
from genrec.errors import DataError
from genrec.item_index import ItemIndex
from genrec.models.baselines import Baseline, make_baselines
from genrec.pipeline.config import RunConfig, check_run_config
from genrec.pipeline.run import Run
from genrec.pipeline.split_checks import Check, split_checks

log = runtime.get_logger(__name__)

Items = Literal["random", "permuted"]
PROBES = 64
MAX_NAMED = 4


@dataclass(frozen=True)
class _World:
    """A data set and the runs that fit on it, in caches of their own.

    Args:
        dataset: unaltered, or with held-out items replaced.
        once: run whose training lasts one epoch.
        twice: run whose training lasts two, so that validation selects.
    """

    dataset: Dataset
    once: Run
    twice: Run


@dataclass(frozen=True)
class _Fitted:
    """What the unaltered world left, for the stages after it."""

    catalog: Catalog
    tokenizer: Artifact
    index: Artifact
    model: Artifact


Fit = Callable[[_World], Mapping[str, np.ndarray]]


def audit(
    config: RunConfig,
    *,
    items: Items = "random",
    users: int = 256,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Return what every check of a configuration found.

    Args:
        config: as for a run; `evaluation.baselines` are checked too.
        items: what held-out items become: "random" (another item, drawn evenly: also finds stages
            that only count) or "permuted" (shuffled among users, so that counts stay).
        users: how many the generator is trained on.
        seed: of the replacement.
        device: torch device name; None chooses.

    Returns:
        JSON types: `dataset`, `items`, `replaced` (how many), `checks` (name, verdict, detail),
        `leaks` (names of those that failed) and `passed`.

    Raises:
        DataError: nothing is held out.
    """
    with tempfile.TemporaryDirectory(prefix="genrec-audit-") as name:
        folder = Path(name)
        dataset = Run(config, out=folder / "data", cache=folder / "data", device=device).dataset()
        held_out = int(np.count_nonzero(dataset.interactions.splits != TRAIN))
        if not held_out:
            raise DataError(
                f"data set {dataset.name!r} has nothing held out, so nothing can leak. Prepare it "
                "with a split."
            )
        worlds = {
            "unaltered": dataset,
            "again": dataset,
            "held_out": replace_items(dataset, TRAIN + 1, items, seed),
            "test": replace_items(dataset, TEST, items, seed),
        }
        made = {
            name: _world(config, folder / name, found, device) for name, found in worlds.items()
        }
        checks = [*split_checks(dataset), *_stage_checks(config, made, users)]
    failed = [check.name for check in checks if check.verdict in ("leak", "unstable")]
    return {
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "items": items,
        "replaced": held_out,
        "checks": [check.to_dict() for check in checks],
        "leaks": failed,
        "passed": not failed,
        "versions": runtime.versions(),
    }


def replace_items(dataset: Dataset, first_split: int, items: Items, seed: int) -> Dataset:
    """Return the data set with other items in the splits from `first_split` on.

    Args:
        dataset: N items.
        first_split: VALID (validation and test) or TEST.
        items: "random": an item other than the one that was there, drawn evenly; "permuted":
            shuffled within each split.
        seed: of the draw.

    Raises:
        DataError: fewer than two items.
    """
    events = dataset.interactions
    if events.num_items < 2:
        raise DataError("audit: the catalogue holds fewer than two items; nothing can be replaced.")
    rng = np.random.default_rng(seed)
    rows = events.item_rows.copy()
    for split in range(first_split, TEST + 1):
        places = np.flatnonzero(events.splits == split)
        if items == "permuted":
            rows[places] = rng.permutation(rows[places])
        else:
            steps = rng.integers(1, events.num_items, len(places))
            rows[places] = (rows[places] + steps) % events.num_items
    return replace(dataset, interactions=replace(events, item_rows=rows))


def _world(config: RunConfig, folder: Path, dataset: Dataset, device: str | None) -> _World:
    """Write the data set to a folder of its own and return the runs that read it."""
    saved = dataset.save(folder / "dataset")
    runs = []
    for epochs in (1, 2):
        settings = _elsewhere(config.to_dict(), config.data.dataset, str(folder / "dataset"))
        settings["data"] = {"dataset": str(folder / "dataset")}
        settings["tracking"] = {}
        if "epochs" in settings["trainer"]:
            settings["trainer"]["epochs"] = min(epochs, settings["trainer"]["epochs"])
        out = folder / f"epochs-{epochs}"
        runs.append(Run(check_run_config(settings), out=out, cache=out / "cache", device=device))
    # The original's fingerprint: folders differ in nothing but items.
    return _World(replace(saved, fingerprint=dataset.fingerprint), *runs)


def _elsewhere(value: Any, old: str | None, new: str) -> Any:
    """Return settings in which every mention of one folder is another."""
    if isinstance(value, Mapping):
        return {key: _elsewhere(part, old, new) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_elsewhere(part, old, new) for part in value]
    return new if old is not None and value == old else value


def _stage_checks(config: RunConfig, worlds: Mapping[str, _World], users: int) -> list[Check]:
    """Fit every stage in the altered world, given what the unaltered one left before it."""
    seed, own = config.seeds[0], worlds["unaltered"]
    catalog = own.once.embed(own.dataset)
    tokenizer, index = own.once.tokenize(own.dataset, catalog, seed)
    numbers = ItemIndex.load(index.path)
    model = own.once.train(_first_users(own.dataset, users), numbers, seed, catalog)
    fitted = _Fitted(catalog, tokenizer, index, model)
    plan: list[tuple[str, str, Fit]] = [
        ("vectors", "held_out", lambda w: _vectors(w.once.embed(w.dataset))),
        (
            "tokenizer",
            "held_out",
            lambda w: _arrays(w.once.tokenize(w.dataset, catalog, seed)[0]),
        ),
        (
            "index",
            "held_out",
            lambda w: _arrays(w.once.index(w.dataset, catalog, tokenizer, "audit")),
        ),
        (
            "generator's weights",
            "held_out",
            lambda w: _arrays(w.once.train(_first_users(w.dataset, users), numbers, seed, catalog)),
        ),
        (
            "generator's selection",
            "test",
            lambda w: _arrays(
                w.twice.train(_first_users(w.dataset, users), numbers, seed, catalog)
            ),
        ),
        ("calibration", "test", lambda w: _calibration(w, fitted, users, seed)),
    ]
    alternation = getattr(config.tokenizer, "alternation", None)
    if alternation and alternation.rounds:
        plan.append(("alternation", "held_out", lambda w: _refined(w, fitted, users, seed)))
    for name, baseline in make_baselines(config.evaluation.baselines).items():
        altered = "test" if baseline.reads_validation else "held_out"
        fit: Fit = lambda w, b=baseline: _baseline(w, b, catalog)  # type: ignore[misc]  # noqa: E731
        plan.append((f"baseline {name}", altered, fit))
    checks = []
    with runtime.progress("audit", len(plan)) as advance:
        for name, altered, fit in plan:
            checks.append(_check(name, altered, fit, worlds))
            advance(1)
    return checks


def _check(name: str, altered: str, fit: Fit, worlds: Mapping[str, _World]) -> Check:
    """Fit twice, and once more where the results differ."""
    first = _digests(fit(worlds["unaltered"]))
    if not first:
        return Check(name, "left out", "nothing is fitted.")
    which = "validation and test items" if altered == "held_out" else "test items"
    changed = _changed(first, _digests(fit(worlds[altered])))
    if not changed:
        count = "1 array is" if len(first) == 1 else f"{len(first)} arrays are"
        return Check(name, "ok", f"{count} the same with other {which}.")
    unstable = _changed(first, _digests(fit(worlds["again"])))
    shown = ", ".join(changed[:MAX_NAMED]) + (", ..." if len(changed) > MAX_NAMED else "")
    if unstable:
        return Check(
            name,
            "unstable",
            f"differs between two fits on the same data ({', '.join(unstable[:MAX_NAMED])}), so "
            "that a leak cannot be told. Fix the seed or the device.",
        )
    return Check(name, "leak", f"changed with other {which}: {shown}.")


def _digests(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: fingerprint(array) for name, array in arrays.items()}


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


# -- stages -------------------------------------------------------------------------------------


def _arrays(artifact: Artifact) -> dict[str, np.ndarray]:
    return dict(artifact.arrays)


def _vectors(catalog: Catalog) -> dict[str, np.ndarray]:
    return {} if catalog.vectors is None else {"vectors": catalog.vectors}


def _calibration(world: _World, fitted: _Fitted, users: int, seed: int) -> dict[str, Any]:
    """Search validation lists with the unaltered model, and fit calibrators on them."""
    run, dataset = world.once, _first_users(world.dataset, users)
    index = ItemIndex.load(fitted.index.path)
    lists = {
        mode_name(masked): run.lists(dataset, index, fitted.model, "valid", masked, seed)
        for masked in run.config.evaluation.masked
    }
    calibration = run.calibrate(dataset, index, fitted.model, lists, seed)
    return {**calibration.arrays, **calibration.extra["modes"]}


def _refined(world: _World, fitted: _Fitted, users: int, seed: int) -> dict[str, np.ndarray]:
    """Run one round of a tokenizer that learns from the generator."""
    index = ItemIndex.load(fitted.index.path)
    dataset = _first_users(world.dataset, users)
    return _arrays(
        world.once.refine(dataset, fitted.catalog, fitted.tokenizer, index, fitted.model, 1, seed)
    )


def _baseline(world: _World, baseline: Baseline, catalog: Catalog) -> dict[str, np.ndarray]:
    """Fit a baseline and return its scores for fixed histories: it has no state to look at."""
    training = world.dataset.interactions.training()
    validation = world.dataset.interactions.examples("valid")
    histories = [training.user(u) for u in range(min(PROBES, training.num_users))]
    return {"scores": baseline.fit(training, catalog, validation).scores(histories)}


def _first_users(dataset: Dataset, users: int) -> Dataset:
    """Return the data set with its first users only: a short training."""
    events = dataset.interactions
    offsets = events.offsets[: users + 1]
    stop = int(offsets[-1])
    few = Interactions(
        events.item_rows[:stop],
        offsets,
        events.timestamps[:stop],
        events.splits[:stop],
        events.num_items,
        None if events.ratings is None else events.ratings[:stop],
    )
    return replace(dataset, interactions=few)
