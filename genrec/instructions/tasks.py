"""What is asked in which task, from which part of the data? The task family of LC-Rec, and more.

Tasks about users take their histories from the interactions that they are given, which must be
those of training; tasks about items take the catalogue. It refuses to know how tasks are mixed and
how an instruction is worded.

Shapes: M interactions, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genrec.data.interactions import Interactions
from genrec.instructions.facts import ItemFacts
from genrec.instructions.templates import Several, Slots, Value


@dataclass(frozen=True)
class Sources:
    """What examples are made of.

    Args:
        facts: words about items.
        interactions: of training only.
        max_history: items of a history at most.
        num_candidates: candidates of the task "choice", the right one included.
    """

    facts: ItemFacts
    interactions: Interactions
    max_history: int
    num_candidates: int = 10


@dataclass(frozen=True)
class Case:
    """One example before it is worded.

    Args:
        history: item rows before, oldest first; empty in tasks about items.
        target: the item row that it is about.
        ratings: of the history, or None.
        rating: of the target, or None.
    """

    history: np.ndarray
    target: int
    ratings: np.ndarray | None = None
    rating: float | None = None


Fill = Callable[[Sources, Case, np.random.Generator], dict[str, Value | None]]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        about: "users" draws places in histories, "items" rows of the catalogue.
        slots: placeholders of its templates.
        fill: gives what they stand for; None where the data says nothing.
        needs: what the data must hold, for messages.
    """

    about: Literal["users", "items"]
    slots: Slots
    fill: Fill
    needs: str


def case_of(sources: Sources, task: Task, place: int, max_history: int) -> Case:
    """Return the example at a place: of the flat interactions, or of the catalogue.

    Args:
        sources: data.
        task: says which.
        place: of the target.
        max_history: items of the history at most.
    """
    if task.about == "items":
        return Case(np.empty(0, np.int64), place)
    events = sources.interactions
    user = int(np.searchsorted(events.offsets, place, side="right")) - 1
    first = max(int(events.offsets[user]), place - max_history)
    rows, ratings = events.item_rows, events.ratings
    return Case(
        rows[first:place].astype(np.int64),
        int(rows[place]),
        None if ratings is None else ratings[first:place],
        None if ratings is None else float(ratings[place]),
    )


def known_at(sources: Sources, task: Task, places_P: np.ndarray) -> dict[str, np.ndarray]:
    """Return which placeholders are certain to stand for something, by name, (P,) bool.

    Of a history only its last item is looked at, which every cut leaves.

    Args:
        sources: data.
        task: says what the places are.
        places_P: of targets.
    """
    facts, events = sources.facts, sources.interactions
    targets_P = places_P if task.about == "items" else events.item_rows[places_P]
    last_P = targets_P if task.about == "items" else events.item_rows[places_P - 1]
    titled_N = np.array([bool(title) for title in facts.titles], dtype=bool)
    recorded_N = np.array([bool(record.pairs) for record in facts.records], dtype=bool)
    labelled_N = np.array([bool(facts.labels(row)) for row in range(len(facts))], dtype=bool)
    searched_N = np.array([facts.has_query(row) for row in range(len(facts))], dtype=bool)
    always_P = np.ones(len(places_P), dtype=bool)
    rated_P = earlier_P = ~always_P
    if events.ratings is not None and task.about == "users":
        rated_P = ~np.isnan(events.ratings[places_P])
        earlier_P = ~np.isnan(events.ratings[places_P - 1])
    return {
        **dict.fromkeys(("history", "item", "candidates"), always_P),
        "titles": titled_N[last_P],
        "described": (titled_N | recorded_N)[last_P],
        "title": titled_N[targets_P],
        "attributes": recorded_N[targets_P],
        "query": searched_N[targets_P],
        "summary": labelled_N[targets_P],
        "rating": rated_P,
        "rated": rated_P & earlier_P,
    }


def _history(sources: Sources, case: Case) -> dict[str, Value | None]:
    facts, rows = sources.facts, case.history.tolist()
    return {
        "history": Several(tuple(rows)),
        "titles": facts.named(rows),
        "described": facts.all_described(rows),
    }


def _item(sources: Sources, case: Case) -> dict[str, Value | None]:
    record = sources.facts.records[case.target]
    return {
        "item": case.target,
        "title": sources.facts.titles[case.target] or None,
        "attributes": record if record.pairs else None,
    }


def _both(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    return {**_history(sources, case), **_item(sources, case)}


def _about_item(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    return _item(sources, case)


def _search(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    facts = sources.facts
    query = facts.query(case.target, rng) if facts.has_query(case.target) else None
    return {**_history(sources, case), "item": case.target, "query": query}


def _preference(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    whole = Case(np.append(case.history, case.target)[-sources.max_history :], case.target)
    summary = sources.facts.summary(whole.history.tolist())
    return {**_history(sources, whole), "summary": summary}


def _rating(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    values = _both(sources, case, rng)
    if case.ratings is None or case.rating is None or np.isnan(case.rating):
        return {**values, "rating": None, "rated": None}
    rated = [
        Several((row, f" ({rating:g})"))
        for row, rating in zip(case.history.tolist(), case.ratings.tolist(), strict=True)
        if not np.isnan(rating)
    ]
    known = Several(tuple(rated), between="; ") if rated else None
    return {**values, "rating": f"{case.rating:g}", "rated": known}


def _choice(sources: Sources, case: Case, rng: np.random.Generator) -> dict[str, Value | None]:
    """Candidates are the target and items drawn from the rest of the catalogue, history left out.

    They are put in the order of their rows, which tells nothing, or shuffled.
    """
    others = np.setdiff1d(np.arange(len(sources.facts)), np.append(case.history, case.target))
    count = min(sources.num_candidates - 1, len(others))
    drawn = rng.choice(others, count, replace=False) if count else others[:0]
    rows = sorted([case.target, *drawn.tolist()])
    candidates = Several(tuple(rows), between="; ", ordered=False)
    return {**_both(sources, case, rng), "candidates": candidates}


def _slots(prompt: str, any_of: str, response: str, answer: str) -> Slots:
    names = [frozenset(text.split()) for text in (prompt, response, any_of)]
    return Slots(prompt=names[0], response=names[1], any_of=names[2], answer=answer)


_USER = "history titles described"
TASKS: Mapping[str, Task] = {
    "sequential": Task(
        "users", _slots(_USER, "history", "item", "item"), _both, "users with two interactions"
    ),
    "item_to_index": Task(
        "items",
        _slots("title attributes", "title attributes", "item", "item"),
        _about_item,
        "titles or attributes of items",
    ),
    "index_to_item": Task(
        "items",
        _slots("item", "item", "title attributes", "title"),
        _about_item,
        "titles of items",
    ),
    "titles_to_index": Task(
        "users",
        _slots("titles described", "titles described", "item", "item"),
        _both,
        "titles of items",
    ),
    "history_to_title": Task(
        "users", _slots("history", "history", "title attributes", "title"), _both, "titles of items"
    ),
    "titles_to_title": Task(
        "users",
        _slots("titles described", "titles described", "title attributes", "title"),
        _both,
        "titles of items",
    ),
    "item_search": Task(
        "users", _slots(f"query {_USER}", "query", "item", "item"), _search, "attributes of items"
    ),
    "preference": Task(
        "users",
        _slots(_USER, "history titles", "summary", "summary"),
        _preference,
        "attributes of items",
    ),
    "rating": Task(
        "users",
        _slots(f"{_USER} rated item title attributes", "item title", "rating", "rating"),
        _rating,
        "ratings (data.prepare.keep_ratings=true)",
    ),
    "choice": Task(
        "users",
        _slots(f"{_USER} candidates", "candidates", "item", "item"),
        _choice,
        "users with two interactions",
    ),
}
"""Name in YAML -> task. The first of them is the plain task of every recommender here."""
SEQUENTIAL = "sequential"
