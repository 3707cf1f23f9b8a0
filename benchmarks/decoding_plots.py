"""How does the time of a search grow with the beam, the catalogue and the history?

Times our constrained beam search alone (CPU seconds, one thread, random weights, the sizes of
benchmarks/decoding.py) and draws three small panels. There is no peer here.

    python -m benchmarks.decoding_plots [--quick] [--json FILE] [--svg FILE]
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.decoding import Size, decoder_only, encoder_decoder, random_batch, random_catalogue
from genrec import runtime
from genrec.decoding import CSRIndex, beam_search

AXES = {
    "beam": "beam width",
    "num_items": "items in the catalogue",
    "history": "items in a history",
}
NAMES = {
    "encoder_decoder": "encoder-decoder (TIGER's size)",
    "decoder_only": "decoder-only (d 256)",
}
COLORS = {"encoder_decoder": "#2b6cb0", "decoder_only": "#c05621"}


@dataclass(frozen=True)
class Point:
    """Milliseconds of CPU per request."""

    axis: str
    model: str
    value: int
    cpu_ms: float


def measure(build: Callable[..., Any], size: Size, options: dict[str, Any], runs: int) -> float:
    """Return the median milliseconds of CPU per request."""
    index = random_catalogue(size)
    model, batch = build(index, size, **options), random_batch(size)
    constraint = CSRIndex.from_index(index)

    def search() -> None:
        with torch.inference_mode():
            beam_search(model, batch, constraint, width=size.beam, k=size.beam)

    search()
    seconds = [common.timed(search)[0] for _ in range(runs)]
    return 1000 * statistics.median(seconds) / size.num_requests


def draw(points: list[Point], path: Path) -> None:
    """Write the three panels as one SVG."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "genrec"  # the same figures give the same file
    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(1, 3), AXES.items(), strict=True):
        for name, color in COLORS.items():
            mine = sorted(
                (point.value, point.cpu_ms)
                for point in points
                if (point.axis, point.model) == (axis, name)
            )
            axes.plot(*zip(*mine, strict=True), "o-", color=color, label=NAMES[name], markersize=3)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axis == "num_items":
            axes.set_xscale("log")
    figure.axes[0].set_ylabel("CPU ms per request")
    figure.axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and draw; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--svg", type=Path, help="write the picture here")
    arguments = parser.parse_args(argv)
    common.one_thread()
    size, runs = Size(12_101, 256, 8, 20, 20, runs=0), 3
    values = {
        "beam": (5, 10, 20, 50, 100, 200),
        "num_items": (1_000, 10_000, 100_000, 1_000_000),
        "history": (5, 10, 20, 40, 80),
    }
    small: dict[str, Any] = {}
    if arguments.quick:
        size, runs = Size(500, 16, 2, 4, 4, runs=0), 1
        values = {"beam": (2, 4), "num_items": (100, 500), "history": (2, 4)}
        small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    models: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "encoder_decoder": (encoder_decoder, small),
        "decoder_only": (
            decoder_only,
            small or {"d_model": 256, "num_layers": 6, "num_heads": 8, "d_ff": 768},
        ),
    }
    points = [
        Point(axis, name, value, measure(build, replace(size, **{axis: value}), options, runs))
        for axis in AXES
        for value in values[axis]
        for name, (build, options) in models.items()
    ]
    result = {
        "machine": common.machine(),
        "versions": runtime.versions(),
        "commit": runtime.git_state().get("commit", "unknown"),
        "points": [asdict(point) for point in points],
    }
    for point in points:
        print(f"{point.axis:>9} {point.value:>9,} {point.model:<16} {point.cpu_ms:8.2f} ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.svg is not None:
        draw(points, arguments.svg)
    return result


if __name__ == "__main__":
    main()
