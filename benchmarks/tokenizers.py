"""How fast are tokenizers fitted, beside the matrix products that they need and beside peers?

Vectors are synthetic: a tree of centres with noise, of the number and width of Amazon Beauty's.
"bare_gemm" runs nothing but the matrix products of the same shapes, as often as the fit did, so
that its ratio says how near to the processor's limit the fit is. Peers get the same layers,
codebooks and epochs; what the codes of both sides are worth stands in the details: collision rate,
utilisation by level, relative squared error. Memory is that of processes of their own, with a
million vectors. "equal" says whether streaming gave the codes of coding in memory.

    python -m benchmarks.tokenizers [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import common
from benchmarks.tokenizer_memory import measure, write_vectors
from benchmarks.tokenizer_peers import (
    RQKMEANS_PEERS,
    RQVAE_PEERS,
    Fit,
    Setting,
    Tokenized,
    missing,
    quiet,
)
from genrec.data import Catalog
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.pq import OPQ, PQ
from genrec.tokenizers.quantization import kmeans
from genrec.tokenizers.rqkmeans import RQKMeans
from genrec.tokenizers.rqvae import RQVAE

MEMORY_LIMIT_GB = 6.0


@dataclass(frozen=True)
class Size:
    """What the cases run on."""

    num_items: int = 12_101
    width: int = 768
    runs: int = 3
    large_items: int = 1_000_000
    large_width: int = 384
    gemm_epochs: int = 4
    setting: Setting = field(default_factory=Setting)


def clustered(num_items: int, width: int, seed: int = 0) -> np.ndarray:
    """Return vectors (num_items, width) float32 of length 1 on a tree 40 x 15 x 8 with noise."""
    rng = np.random.default_rng(seed)
    inner = min(96, width)
    basis, _ = np.linalg.qr(rng.standard_normal((width, inner)))
    branches = [_skewed(rng, count, num_items) for count in (40, 15, 8)]
    points = 0.3 * rng.standard_normal((num_items, inner))
    for depth, scale in enumerate((1.0, 0.6, 0.4), start=1):
        centres = scale * rng.standard_normal((*(40, 15, 8)[:depth], inner))
        points += centres[tuple(branches[:depth])]
    found = points @ basis.T + 0.08 * rng.standard_normal((num_items, width))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float32)


def _skewed(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    weights = np.arange(1, count + 1) ** -0.8
    chosen: np.ndarray = rng.choice(count, size, p=weights / weights.sum())
    return chosen


def worth(vectors: np.ndarray, found: Tokenized, num_codes: int) -> dict[str, Any]:
    """Return what codes are worth: collisions, use of codes, error relative to the variance."""
    codes = np.asarray(found.codes)
    spread = np.square(vectors - vectors.mean(axis=0)).sum()
    used = [len(np.unique(codes[:, level])) / num_codes for level in range(codes.shape[1])]
    return {
        "collision_rate": 1 - len(np.unique(codes, axis=0)) / len(codes),
        "utilisation": used,
        "relative_squared_error": float(np.square(vectors - found.decoded).sum() / spread),
    }


def tokenized(tokenizer: ItemTokenizer, catalog: Catalog) -> Tokenized:
    """Fit and return codes and decoded vectors."""
    codes = tokenizer.fit(catalog).encode(catalog)
    return Tokenized(codes, tokenizer.decode(codes))


# -- against the matrix products --------------------------------------------------------------


def case_rqkmeans_products(vectors: np.ndarray, size: Size) -> common.Row:
    """Time a fit of RQ-KMeans against the products of all points with all centroids it made."""
    catalog = Catalog.from_vectors(vectors)
    config = RQKMeans.Config(codebook_size=size.setting.num_codes)
    count = _count_products(lambda: RQKMeans(config).fit(catalog), size.width)
    centroids = vectors[: size.setting.num_codes].copy()

    def products() -> None:
        for _ in range(count):
            vectors @ centroids.T

    timings = common.alternate(lambda: RQKMeans(config).fit(catalog), products, runs=size.runs)
    slower = timings[0].cpu / timings[1].cpu
    return common.Row.of_timings(
        f"rqkmeans fit, {_shape(vectors)}, {_books(size.setting)}", "bare_gemm", *timings, None,
        products=count, times_the_products=slower,
    )  # fmt: skip


def _count_products(fit: Callable[[], Any], width: int) -> int:
    """Return how often `nearest` met points of full width (the start looks at fewer)."""
    original, count = kmeans.nearest, 0

    def counting(points_NE: np.ndarray, *rest: Any) -> Any:
        nonlocal count
        count += points_NE.shape[1] == width
        return original(points_NE, *rest)

    kmeans.nearest = counting
    try:
        fit()
    finally:
        kmeans.nearest = original
    return count


def case_rqvae_products(vectors: np.ndarray, size: Size, setting: Setting) -> common.Row:
    """Time training epochs of the RQ-VAE against the products of its linear layers."""
    catalog = Catalog.from_vectors(vectors)
    config = rqvae_config(replace(setting, epochs=size.gemm_epochs), kmeans_init=False)
    products = _layer_products(len(vectors), (size.width, *setting.hidden, setting.latent), config)
    timings = common.alternate(lambda: RQVAE(config).fit(catalog), products, runs=size.runs)
    widths = "-".join(map(str, (size.width, *setting.hidden, setting.latent)))
    return common.Row.of_timings(
        f"rqvae training, {widths}, {_books(setting)}, batch {config.batch_size}",
        "bare_gemm", *timings, None,
        share_of_gemm_speed=timings[1].cpu / timings[0].cpu,
        items_per_cpu_s=len(vectors) * size.gemm_epochs / timings[0].cpu,
    )  # fmt: skip


def _layer_products(
    num_items: int, widths: tuple[int, ...], config: RQVAE.Config
) -> Callable[[], None]:
    """Return a call of all products of forward and backward passes of encoder and decoder.

    Three for every layer and batch, but two for the first: nothing asks for the gradient of the
    vectors.
    """
    steps = -(-num_items // config.batch_size)
    rows = -(-num_items // steps)
    shapes = [*pairwise(widths), *pairwise(widths[::-1])]
    layers = [(torch.rand(rows, i), torch.rand(rows, o), torch.rand(o, i)) for i, o in shapes]
    results = [(torch.empty(rows, o), torch.empty(o, i), torch.empty(rows, i)) for i, o in shapes]

    def products() -> None:
        for _ in range(config.num_epochs * steps):
            for place, (layer, out) in enumerate(zip(layers, results, strict=True)):
                x_BI, grad_BO, weight_OI = layer
                torch.mm(x_BI, weight_OI.T, out=out[0])
                torch.mm(grad_BO.T, x_BI, out=out[1])
                if place:
                    torch.mm(grad_BO, weight_OI, out=out[2])

    return products


def rqvae_config(setting: Setting, **changes: Any) -> RQVAE.Config:
    """Return our settings for what all sides are given."""
    return RQVAE.Config(
        num_levels=setting.num_levels,
        codebook_size=setting.num_codes,
        latent_dim=setting.latent,
        hidden_dims=setting.hidden,
        batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        num_epochs=setting.epochs,
        **changes,
    )


# -- against peers ----------------------------------------------------------------------------


def cases_peers(vectors: np.ndarray, size: Size) -> tuple[list[common.Row], list[dict[str, str]]]:
    """Return a row for each peer that is installed, and a reason for each that is not."""
    setting = size.setting
    ours = {
        f"rqvae, {setting.epochs} epochs": (lambda: RQVAE(rqvae_config(setting)), RQVAE_PEERS),
        f"rqkmeans, {setting.iterations} iterations": (
            lambda: RQKMeans(RQKMeans.Config(codebook_size=setting.num_codes)),
            RQKMEANS_PEERS,
        ),
    }
    rows, skipped = [], []
    for case, (make, peers) in ours.items():
        for name, (module, fit) in peers.items():
            reason = missing(module)
            if reason is not None:
                skipped.append({"case": case, "baseline": name, "reason": reason})
                continue
            rows.append(_against(case, name, make, fit, vectors, size))
    return rows, skipped


def _against(
    case: str,
    name: str,
    make: Callable[[], ItemTokenizer],
    fit: Fit,
    vectors: np.ndarray,
    size: Size,
) -> common.Row:
    catalog, setting = Catalog.from_vectors(vectors), size.setting
    found: dict[str, Tokenized] = {}

    def run_ours() -> None:
        found["ours"] = tokenized(make(), catalog)

    def run_theirs() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        with quiet():
            found["theirs"] = fit(vectors, setting)

    with quiet():  # imports and first calls are not what is timed
        fit(vectors[: setting.batch_size], replace(setting, epochs=1))
    runs = max(1, size.runs - 2)  # a fit is long, and the ratios are far from 1
    timings = common.alternate(run_ours, run_theirs, runs=runs, warm_up=0)
    details = {
        f"codes_of_{side}": worth(vectors, result, setting.num_codes)
        for side, result in found.items()
    }
    return common.Row.of_timings(
        f"{case}, fit and encode {_shape(vectors)}", name, *timings, None, **details
    )


# -- product quantization ---------------------------------------------------------------------


def case_opq(vectors: np.ndarray, size: Size, num_levels: int) -> common.Row:
    """Compare the errors of OPQ and PQ; ratio: how many times smaller OPQ's is."""
    catalog, codes = Catalog.from_vectors(vectors), size.setting.num_codes
    found: dict[str, Tokenized] = {}

    def fit(name: str, cls: type[PQ]) -> None:
        config = cls.Config(num_levels=num_levels, codebook_size=codes)
        found[name] = tokenized(cls(config), catalog)

    timings = common.alternate(lambda: fit("opq", OPQ), lambda: fit("pq", PQ), runs=1, warm_up=0)
    details = {name: worth(vectors, result, codes) for name, result in found.items()}
    errors = [details[name]["relative_squared_error"] for name in ("opq", "pq")]
    return common.Row(
        f"opq, {_shape(vectors)}, {num_levels} x {codes}", "pq", *errors, errors[1] / errors[0],
        "relative squared error", None,
        details={**details, "opq_cpu_s": timings[0].cpu, "pq_cpu_s": timings[1].cpu},
    )  # fmt: skip


# -- memory -----------------------------------------------------------------------------------


def cases_memory(size: Size) -> list[common.Row]:
    """Return the rows that take a large file of vectors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npy"
        write_vectors(file, size.large_items, size.large_width)
        sample = Catalog.from_vectors(np.array(np.load(file, mmap_mode="r")[:20_000]))
        small = replace(size.setting, epochs=1)
        tokenizers: dict[str, ItemTokenizer] = {
            "rqkmeans": RQKMeans(RQKMeans.Config(codebook_size=small.num_codes, num_iterations=3)),
            "rqvae": RQVAE(rqvae_config(small)),
        }
        rows = [case_fit_memory(file, size)]
        for name, tokenizer in tokenizers.items():
            tokenizer.fit(sample).save(Path(folder) / name)
            rows.append(case_stream(name, file, Path(folder) / name, size))
    return rows


def case_fit_memory(file: Path, size: Size) -> common.Row:
    """Fit RQ-KMeans on the large file; ratio: how often its memory fits into the limit."""
    found = measure("fit", file, "--codes", str(size.setting.num_codes))
    peak = found["peak_gb"]
    return common.Row(
        f"rqkmeans fit, {_large(size)}", "limit", peak, MEMORY_LIMIT_GB, MEMORY_LIMIT_GB / peak,
        "GB", None, details=found,
    )  # fmt: skip


def case_stream(name: str, file: Path, saved: Path, size: Size) -> common.Row:
    """Code the large file batch by batch and as a whole; equal: the codes are the same."""
    options = ("--tokenizer", str(saved))
    ours, theirs = (measure(job, file, *options) for job in ("stream", "whole"))
    details = {
        "items_per_cpu_s": size.large_items / ours["cpu_s"],
        "items_per_wall_s": size.large_items / ours["wall_s"],
        "cpu_ratio": theirs["cpu_s"] / ours["cpu_s"],
        "streamed": ours,
        "whole": theirs,
    }
    peaks = ours["peak_gb"], theirs["peak_gb"]
    return common.Row(
        f"{name} encode from disk, {_large(size)}", "read as a whole", *peaks,
        peaks[1] / peaks[0], "GB", ours["codes"] == theirs["codes"], details=details,
    )  # fmt: skip


def _shape(vectors: np.ndarray) -> str:
    return f"{len(vectors):,} x {vectors.shape[1]}"


def _large(size: Size) -> str:
    return f"{size.large_items:,} x {size.large_width}"


def _books(setting: Setting) -> str:
    return f"{setting.num_levels} x {setting.num_codes}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    arguments = common.parser(__doc__).parse_args(argv)
    os.environ["GENREC_PROGRESS"] = "0"
    common.one_thread()
    size = Size()
    if arguments.quick:
        tiny = Setting(num_codes=32, hidden=(64, 32), latent=16, batch_size=256, epochs=2)
        size = Size(1_500, 96, 2, 20_000, 48, 2, tiny)
    with threadpool_limits(1):
        rows, skipped = cases(size)
    for entry in skipped:
        print("skipped: {case}, {baseline}: {reason}".format(**entry), file=sys.stderr)
    return common.report(rows, arguments.json, skipped=skipped)


def cases(size: Size) -> tuple[list[common.Row], list[dict[str, str]]]:
    """Return all rows and what was skipped; see the module's text."""
    vectors = clustered(size.num_items, size.width)
    deep = replace(size.setting, num_levels=4, hidden=size.setting.hidden, latent=64)
    rows = [
        case_rqkmeans_products(vectors, size),
        case_rqvae_products(vectors, size, replace(deep, batch_size=1024)),
        case_rqvae_products(vectors, size, replace(size.setting, batch_size=256)),
        case_opq(vectors, size, 4),
        case_opq(vectors, size, 16),
    ]
    peers, skipped = cases_peers(vectors, size)
    return [*rows, *peers, *cases_memory(size)], skipped


if __name__ == "__main__":
    main()
