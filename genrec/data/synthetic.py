"""Data with known answers: a planted tree of items, and the ring world. Nothing here reads files.

`planted` is tier T1 of the tests: items sit on a depth-3 tree, an item's vector is the sum of its
nodes' vectors plus noise, and the next item stays in the leaf, moves to a sibling leaf, or is any
item. `planted_transitions` gives the true law, hence the best recall that any model can reach.
`ring` is deterministic: after item i comes item i + 1.

Shapes: N items, U users, E embedding width.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from genrec.artifacts import fingerprint
from genrec.data.catalog import ITEM_ID, TITLE, Catalog
from genrec.data.dataset import Dataset
from genrec.data.interactions import Interactions
from genrec.data.splits import leave_one_out
from genrec.errors import UserError

STAY, SIBLING = 0.6, 0.25  # the rest of the probability is uniform over the catalogue
_CATEGORY = "category"
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


def planted(
    num_items: int = 128,
    num_users: int = 500,
    seed: int = 0,
    *,
    branching: int = 4,
    length: tuple[int, int] = (6, 16),
    width: int = 16,
    noise: float = 0.1,
) -> Dataset:
    """Return interactions on a depth-3 tree, leave-one-out split, with vectors in the catalogue.

    Args:
        num_items: N >= branching ** 3.
        num_users: U.
        seed: of everything that is drawn.
        branching: children per node; the tree has branching ** 3 leaves.
        length: smallest and largest number of interactions of a user (both included).
        width: E of the vectors; node vectors have norm 1, 1/2 and 1/4 on levels 1 to 3.
        noise: standard deviation of the length of the noise relative to a leaf's vector.

    Raises:
        UserError: fewer items than leaves, or lengths below 3 (leave-one-out needs three).
    """
    num_leaves = branching**3
    if num_items < num_leaves or branching < 2:
        raise UserError(
            f"planted: got num_items={num_items} with branching={branching}, expected branching "
            f">= 2 and at least one item for each of the {num_leaves} leaves."
        )
    if length[0] < 3 or length[1] < length[0]:
        raise UserError(f"planted: got length={length}, expected 3 <= smallest <= largest.")
    rng = np.random.default_rng(seed)
    leaves = rng.permutation(np.arange(num_items) % num_leaves)
    catalog = _tree_catalog(leaves, branching, width, noise, rng)
    lengths = rng.integers(length[0], length[1] + 1, size=num_users)
    steps = _walk(leaves, branching, num_users, int(lengths.max(initial=0)), rng)
    return _dataset(
        f"planted-{num_items}-{num_users}-{seed}",
        catalog,
        [walk[:n] for walk, n in zip(steps, lengths, strict=True)],
    )


def ring(num_items: int = 12, num_users: int = 48, length: int = 8) -> Dataset:
    """Return the ring world: user u starts at item u mod N, and item i + 1 mod N follows item i.

    Vectors are points of a circle in several frequencies (N, 8), all different.
    """
    if num_items < 2 or length < 1:
        raise UserError(
            f"ring: got num_items={num_items}, length={length}; expected at least 2 and 1."
        )
    angles = 2 * np.pi * np.arange(num_items) / num_items
    frequencies = np.array([1, 2, 3, 4]) * angles[:, None]
    vectors = np.concatenate([np.cos(frequencies), np.sin(frequencies)], axis=1)
    table = pl.DataFrame(
        {
            ITEM_ID: [str(i) for i in range(num_items)],
            TITLE: [f"Ring item {i}" for i in range(num_items)],
        }
    )
    walks = (np.arange(num_users)[:, None] + np.arange(length)) % num_items
    return _dataset(
        f"ring-{num_items}-{num_users}-{length}",
        Catalog(table, vectors.astype(np.float32)),
        list(walks),
    )


def planted_leaves(catalog: Catalog) -> np.ndarray:
    """Return the leaf of each item of a planted catalogue, (N,) int64."""
    names = [category[-1] for category in catalog.table[_CATEGORY].to_list()]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def planted_transitions(catalog: Catalog) -> np.ndarray:
    """Return the true law of a planted catalogue: entry (i, j) = P(next is j | last is i), (N, N).

    The best possible Recall@k of a last item is the sum of the k largest entries of its row.
    """
    categories = catalog.table[_CATEGORY].to_list()
    leaves = planted_leaves(catalog)
    parents = np.unique([c[-2] for c in categories], return_inverse=True)[1]
    same_leaf = leaves[:, None] == leaves[None, :]
    siblings = (parents[:, None] == parents[None, :]) & ~same_leaf
    weight = 1.0 / np.bincount(leaves)[leaves]  # each leaf is drawn first, then an item in it
    stay = STAY * same_leaf * weight
    num_siblings = (siblings * weight).sum(axis=1, keepdims=True)
    move = SIBLING * siblings * weight / num_siblings
    return stay + move + (1.0 - STAY - SIBLING) / len(leaves)


def _tree_catalog(
    leaves: np.ndarray, branching: int, width: int, noise: float, rng: np.random.Generator
) -> Catalog:
    vectors = np.zeros((len(leaves), width))
    names: list[list[str]] = [[] for _ in leaves]
    for level in range(3):
        nodes = leaves // branching ** (2 - level)
        means = rng.normal(size=(branching ** (level + 1), width))
        means *= 0.5**level / np.linalg.norm(means, axis=1, keepdims=True)
        vectors += means[nodes]
        for name, node in zip(names, nodes, strict=True):
            name.append(_word(level, int(node)))
    vectors += rng.normal(size=vectors.shape) * noise * 0.25 / np.sqrt(width)
    table = pl.DataFrame(
        {
            ITEM_ID: [f"i{row}" for row in range(len(leaves))],
            TITLE: [f"{' '.join(name)} {row}" for row, name in enumerate(names)],
            _CATEGORY: names,
        }
    )
    return Catalog(table, vectors.astype(np.float32))


def _word(level: int, node: int) -> str:
    base = len(_SYLLABLES)
    syllables = [_SYLLABLES[level], _SYLLABLES[node % base]]
    while node >= base:
        node //= base
        syllables.append(_SYLLABLES[node % base])
    return "".join(syllables) + "nrt"[level]


def _walk(
    leaves: np.ndarray, branching: int, num_users: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    by_leaf = np.argsort(leaves, kind="stable")
    counts = np.bincount(leaves, minlength=branching**3)
    starts = np.cumsum(counts) - counts
    walks = np.zeros((num_users, steps), dtype=np.int64)
    for step in range(steps):
        anywhere = rng.integers(len(leaves), size=num_users)
        kind = rng.random(num_users)
        draw = rng.random(num_users)
        shift = rng.integers(1, branching, size=num_users)
        if step == 0:
            walks[:, 0] = anywhere
            continue
        leaf = leaves[walks[:, step - 1]]
        sibling = leaf // branching * branching + (leaf + shift) % branching
        chosen = np.where(kind < STAY, leaf, sibling)
        inside = by_leaf[starts[chosen] + (draw * counts[chosen]).astype(np.int64)]
        walks[:, step] = np.where(kind < STAY + SIBLING, inside, anywhere)
    return walks


def _dataset(name: str, catalog: Catalog, walks: list[np.ndarray]) -> Dataset:
    lengths = np.array([len(walk) for walk in walks], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_rows = np.concatenate(walks) if walks else np.empty(0, np.int64)
    interactions = Interactions(
        item_rows.astype(np.int32),
        offsets,
        np.concatenate([np.arange(1, n + 1) for n in lengths] or [np.empty(0)]).astype(np.int64),
        leave_one_out(offsets),
        len(catalog),
    )
    info = {
        "name": name,
        "source": "synthetic",
        "split": {"name": "leave_one_out"},
        "num_users": len(walks),
        "num_items": len(catalog),
    }
    digest = fingerprint(info, catalog.fingerprint, interactions.fingerprint)
    return Dataset(catalog, interactions, info, digest)
