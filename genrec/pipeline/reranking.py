"""What does re-ranking the lists of a finished run gain, and what does it cost? One row a strength.

It takes the lists from the stage cache, or searches them with the run's bundle; the methods are in
`genrec.calibration.lists`, the figures in `genrec.evaluation`.

Shapes: U users, M candidates, N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from genrec import runtime
from genrec.bundle import load_bundle, mode_name
from genrec.calibration.base import ListContext
from genrec.calibration.lists import RERANKERS
from genrec.calibration.lists.base import Candidates, ItemFacts, Reranked, Reranker
from genrec.calibration.lists.exposure import Exposure
from genrec.calibration.lists.popularity import popularity_groups
from genrec.config import parse_component
from genrec.data import Dataset
from genrec.data.rules import group_labels
from genrec.decoding import CSRIndex
from genrec.errors import DataError, UserError
from genrec.evaluation import beyond_accuracy, metrics
from genrec.evaluation.list_content import ItemAttributes
from genrec.evaluation.significance import mean_ci, paired_bootstrap
from genrec.inference import context_of, level_logprobs, search
from genrec.pipeline.finished import FinishedRun
from genrec.pipeline.listing import read_lists
from genrec.pipeline.stages import check_index

log = runtime.get_logger(__name__)

POPULARITY = "popularity"
SHOWN = ("calibration_miss", "coverage", "long_tail_share", "diversity_attributes")


@dataclass(frozen=True, eq=False)
class TradeOffInputs:
    """The lists of a run and everything known about their users and items.

    Args:
        candidates: lists of the test users, with histories.
        facts: groups by the chosen attribute, training counts, vectors where at hand.
        around: for the figures; its attribute is the chosen one.
        source: where the lists come from, in words.
    """

    candidates: Candidates
    facts: ItemFacts
    around: beyond_accuracy.Surroundings
    source: str


def trade_off(
    inputs: TradeOffInputs,
    method: str,
    strengths: Sequence[float],
    *,
    k: int = 10,
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return what each strength gains and costs.

    Args:
        inputs: lists and facts.
        method: name in `RERANKERS`.
        strengths: one row each.
        k: list length.
        options: further settings of the method.

    Returns:
        JSON rows: `strength`; `recall@k`, `ndcg@k` with `_ci`, and `vs_unchanged` (metric ->
        difference, ci, p, paired over users); `cost` (mean sum of scores given up), `hits_lost`
        (expected hits given up by all users, None without probabilities) and the figures of
        `beyond_accuracy.list_figures`; `exposure` (shares and gap) for that method.

    Raises:
        ConfigError: an unknown method or setting.
        UserError: facts that the method needs are not at hand.
    """
    if not 1 <= k <= inputs.candidates.rows_UM.shape[1]:
        raise UserError(
            f"-k: got {k}, expected 1 to {inputs.candidates.rows_UM.shape[1]}, the length of the "
            "candidate lists. Ask for a larger --width."
        )
    unchanged: dict[str, np.ndarray] = metrics.list_metrics(
        inputs.candidates.rows_UM[:, :k], inputs.around.examples.target_rows, [k]
    )
    rows = []
    for strength in strengths:
        section = {"name": method, **(options or {}), "strength": strength}
        cls, config = parse_component(RERANKERS, section, path="rerank")
        reranker: Reranker = cls(config, inputs.facts)
        if isinstance(reranker, Exposure):
            reranker.fit(inputs.candidates, k)
        found = reranker.rerank(inputs.candidates, k)
        row = {"strength": float(strength), **_figures(inputs, found, unchanged, k)}
        if isinstance(reranker, Exposure):
            shares_G = reranker.exposure(inputs.candidates, found.places_Uk)
            row["exposure"] = {"shares": shares_G.tolist(), "gap": reranker.gap}
        rows.append(row)
    return rows


def gather(
    run: FinishedRun,
    *,
    by: str | None = None,
    masked: bool = True,
    width: int | None = None,
    device: str | None = None,
) -> TradeOffInputs:
    """Find, or search, the lists of a run's test users.

    Args:
        run: finished run.
        by: column of the catalogue, "popularity" for three groups by training counts, or None.
        masked: seen items left out.
        width: candidates per list; default the bundle's beam width.
        device: torch device name for a search.

    Raises:
        DataError: the data set is not at hand, or an unknown column.
        MismatchError: another data set than the run's.
    """
    found = run.dataset()
    if found is None:
        raise DataError(
            f"the data set of run {str(run.folder)!r} ({run.dataset_fingerprint}) is not at hand. "
            "Give --dataset DIR (of `genrec prepare`) or the --cache that the run used."
        )
    counts_N = found.interactions.training().counts()
    groups_N = None if by is None else _groups(found, by, counts_N)
    vectors = run.vectors(found.catalog)
    candidates, source = _candidates(run, found, masked, width, device)
    around = beyond_accuracy.Surroundings(
        found.interactions.examples("test"),
        counts_N,
        None if groups_N is None or by is None else _attributes(by, groups_N),
        vectors,
    )
    return TradeOffInputs(candidates, ItemFacts(groups_N, counts_N, vectors), around, source)


def _figures(
    inputs: TradeOffInputs, found: Reranked, unchanged: Mapping[str, np.ndarray], k: int
) -> dict[str, Any]:
    rows_Uk = found.take(inputs.candidates.rows_UM, -1)
    values = metrics.list_metrics(rows_Uk, inputs.around.examples.target_rows, [k])
    row: dict[str, Any] = {"vs_unchanged": {}}
    for name in (f"recall@{k}", f"ndcg@{k}"):
        mean, low, high = mean_ci(values[name])
        row[name], row[f"{name}_ci"] = mean, [low, high]
        row["vs_unchanged"][name] = paired_bootstrap(values[name], unchanged[name])
    row["cost"] = float(found.costs_U.mean())
    lost_U = found.hits_lost_U
    row["hits_lost"] = None if lost_U is None else float(lost_U.sum())
    return {**row, **beyond_accuracy.list_figures(rows_Uk, inputs.around, k)}


def _groups(dataset: Dataset, by: str, counts_N: np.ndarray) -> np.ndarray:
    if by == POPULARITY and by not in dataset.catalog.columns:
        return popularity_groups(counts_N)
    return group_labels(dataset.catalog, by)


def _attributes(name: str, groups_N: np.ndarray) -> ItemAttributes:
    members_NG = ItemFacts(groups_N).members_NG
    labels = [str(group) for group in range(members_NG.shape[1])]
    return ItemAttributes(name, labels, sp.csr_array(members_NG.astype(np.float32)))


def _candidates(
    run: FinishedRun, dataset: Dataset, masked: bool, width: int | None, device: str | None
) -> tuple[Candidates, str]:
    examples = dataset.interactions.examples("test")
    histories = examples.histories()
    bundle, chosen = load_bundle(run.bundle), runtime.choose_device(device)
    check_index(dataset, bundle.index)
    model, constraint = bundle.model.to(chosen), CSRIndex.from_index(bundle.index).to(chosen)
    exclude = histories if masked else None
    cached, source = run.lists(masked, width=width), "the stage cache"
    if cached is not None:
        lists, _ = read_lists(cached)
    else:
        source, depth = "a search with the bundle", min(width or bundle.width, len(bundle.index))
        lists = search(
            model,
            constraint,
            histories,
            width=depth,
            k=depth,
            exclude=exclude,
            scoring=bundle.scoring,
            context=context_of(model, examples),
            description="search test",
        )
    calibrator = bundle.calibrators.get(mode_name(masked))
    if calibrator is None:
        log.warning("no calibrator for these lists in the bundle: expected hits are left out.")
        return Candidates(lists.rows, lists.scores, None, histories), source
    levels = None
    if "level_logprobs" in calibrator.needs:
        levels = level_logprobs(
            model,
            constraint,
            histories,
            lists.rows,
            scoring=bundle.scoring,
            context=context_of(model, examples),
        )
    context = ListContext(examples.lengths, levels)
    probabilities = calibrator.probabilities(lists.logprobs, lists.num_rest, context)
    return Candidates(lists.rows, lists.scores, probabilities, histories), source
