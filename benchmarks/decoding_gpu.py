"""How fast is the recorded search on a GPU, beside `generate` and beside STATIC?

Requests a second at wide beams, latency of single requests, what bfloat16 changes, and the search
without a model beside the STATIC method (arXiv 2602.22647) on the same catalogue. Wall seconds,
with the device synchronised around each run. Weights are random. On a CPU it runs too, eagerly and
at small sizes: that tests the benchmark and measures nothing.

    python -m benchmarks.decoding_gpu [--quick] [--static CHECKOUT] [--json FILE]

CHECKOUT is a clone of STATIC's repository (`static_decoding` in it is imported as it is); without
it its rows are left out.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.decoding import (
    Size,
    compare,
    decoder_only,
    encoder_decoder,
    peer,
    random_batch,
    random_catalogue,
    random_codes,
)
from genrec.decoding import Beams, CSRIndex, beam_search
from genrec.decoding.captured import CapturedSearch
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch

BEAMS = (50, 256)


def seconds(
    function: Callable[[], Any], device: torch.device, runs: int, warm_up: int
) -> list[float]:
    """Return wall seconds of each run, from a synchronised device to a synchronised device."""
    found = []
    for run in range(warm_up + runs):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        if run >= warm_up:
            found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Case:
    """A model, its catalogue and requests on the device."""

    def __init__(self, name: str, model: Backbone, index: ItemIndex, size: Size, device: Any):
        self.name, self.index, self.size = name, index, size
        self.device = torch.device(device)
        self.model: Any = model.to(self.device)
        self.constraint = CSRIndex.from_index(index).to(self.device)
        self.batch = random_batch(size).to(self.device)
        self.histories = self.batch.history_BH.tolist()

    def captured(self, **options: Any) -> CapturedSearch:
        """Return a search that records its graphs."""
        limits: Any = {"max_requests": self.size.num_requests, "max_history": self.size.history}
        return CapturedSearch(self.model, self.constraint, Batch, **limits, **options)

    def eager(self) -> Beams:
        """Search without recording."""
        width = self.size.beam
        with torch.inference_mode():
            return beam_search(
                self.model, self.batch, self.constraint, width=width, k=width, static_shapes=True
            )

    def row(
        self, name: str, baseline: str, ours: list[float], theirs: list[float], **more: Any
    ) -> common.Row:
        """Compare medians; the tails go to the details."""
        tails = {
            f"{side}_p{q}": float(np.quantile(values, q / 100))
            for side, values in (("ours", ours), ("theirs", theirs))
            for q in (50, 99)
        }
        first, second = float(np.median(ours)), float(np.median(theirs))
        equal = more.pop("equal", None)
        details = {**tails, "requests_per_s": self.size.num_requests / first, **more}
        name = f"{self.name}, {name}"
        return common.Row(name, baseline, first, second, second / first, "wall_s", equal, details)


def case_rates(case: Case) -> list[common.Row]:
    """Requests a second, beside `generate` and beside our search without a graph; bfloat16."""
    width, size = case.size.beam, case.size
    search, half = case.captured(), case.captured(autocast=torch.bfloat16)

    def ours() -> Beams:
        return search(case.histories, width=width, k=width)

    def in_half() -> Beams:
        return half(case.histories, width=width, k=width)

    theirs = peer(case.model, case.index, case.batch, width)
    beams = ours()
    details = compare(_on_cpu(beams), _outputs_on_cpu(theirs()), case.index, case.model)
    details["equal"] = details["equal_lists"] == details["lists"]
    shared = [
        len(np.intersect1d(a, b)) / width
        for a, b in zip(beams.rows_Bk.tolist(), in_half().rows_Bk.tolist(), strict=True)
    ]
    name = f"{size.num_requests} requests, beam {width}"
    times = seconds(ours, case.device, size.runs, 2)
    return [
        case.row(name, "hf_generate", times, seconds(theirs, case.device, 2, 1), **details),
        case.row(name, "ours_eager", times, seconds(case.eager, case.device, size.runs, 2)),
        case.row(
            f"{name}, bfloat16",
            "ours_float32",
            seconds(in_half, case.device, size.runs, 2),
            times,
            overlap=float(np.mean(shared)),
            lowest_overlap=float(min(shared)),
        ),
    ]


def case_latency(case: Case) -> common.Row:
    """One request at a time."""
    width = case.size.beam
    search = case.captured()
    theirs = peer(case.model, case.index, case.batch, width)
    ours = seconds(
        lambda: search(case.histories, width=width, k=width), case.device, 20 * case.size.runs, 3
    )
    return case.row(
        f"one request, beam {width}", "hf_generate", ours, seconds(theirs, case.device, 10, 1)
    )


class RandomLogits:
    """A StepModel that costs next to nothing: what is left is the search."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes

    def begin(self, batch: Tensor) -> tuple[Tensor, None]:
        """Return logits of level 0."""
        return torch.rand(len(batch), self.num_codes, device=batch.device), None

    def step(self, codes_R: Tensor, state: None, parents_R: Tensor) -> tuple[Tensor, None]:
        """Return logits of the next level."""
        return torch.rand(len(codes_R), self.num_codes, device=codes_R.device), None


def case_static(checkout: Path, size: Size, device: torch.device) -> list[common.Row]:
    """The search alone, on random logits normalised over the level, beside STATIC's."""
    sys.path.insert(0, str(checkout))
    builder = importlib.import_module("static_decoding.csr_utils")
    decoding = importlib.import_module("static_decoding.decoding_pt")
    codes_NL = random_codes(size)
    order = np.lexsort(codes_NL.T[::-1])
    packed, pointers, branches, start_mask, dense_mask, dense_states = builder.build_static_index(
        codes_NL[order], vocab_size=size.num_codes, dense_lookup_layers=2
    )
    tables = [torch.as_tensor(array, device=device) for array in (packed, pointers, start_mask)]
    dense = [torch.as_tensor(array, device=device) for array in (dense_mask, dense_states)]
    their_model = decoding.RandomModel(size.num_codes, device)

    def theirs() -> Any:
        return decoding.sparse_transition_torch(
            their_model,
            size.num_requests,
            size.beam,
            min(size.beam, size.num_codes),
            0,
            size.num_levels,
            size.num_codes,
            branches,
            *tables,
            *dense,
            device,
        )

    sizes = (size.num_codes,) * size.num_levels
    constraint = CSRIndex.from_codes(codes_NL, sizes).to(device)
    model, batch = RandomLogits(size.num_codes), torch.zeros(size.num_requests, 1, device=device)
    rows = batch.long().tolist()
    search = CapturedSearch(
        model, constraint, lambda x: x, scoring="level", max_requests=size.num_requests
    )
    options: Any = {"width": size.beam, "k": size.beam}

    def eager() -> Beams:
        return beam_search(model, batch, constraint, scoring="level", static_shapes=True, **options)

    their_bytes = sum(t.numel() * t.element_size() for t in [*tables, *dense])
    details = {
        "bytes_per_item": constraint.num_bytes / size.num_items,
        "their_bytes_per_item": their_bytes / size.num_items,
    }
    times = seconds(theirs, device, size.runs, 2)
    name = f"no model, {size.num_items:,} items, {size.num_requests} requests, beam {size.beam}"
    found = []
    for form, ours in (("graph", lambda: search(rows, **options)), ("eager", eager)):
        mine = seconds(ours, device, size.runs, 2)
        first, second = float(np.median(mine)), float(np.median(times))
        tails = {"ours_p99": np.quantile(mine, 0.99), "theirs_p99": np.quantile(times, 0.99)}
        more = {**details, **{key: float(value) for key, value in tails.items()}}
        found.append(
            common.Row(
                f"{name}, {form}", "static", first, second, second / first, "wall_s", None, more
            )
        )
    return found


def _on_cpu(beams: Beams) -> Beams:
    fields = {name: getattr(beams, name) for name in Beams.__dataclass_fields__}
    return replace(beams, **{n: t.cpu() for n, t in fields.items() if t is not None})


def _outputs_on_cpu(output: Any) -> Any:
    output.sequences_scores = output.sequences_scores.cpu()
    return output


def cases(quick: bool, device: torch.device, beam: int, num_requests: int) -> list[Case]:
    """Return the two backbones with this beam and batch."""
    if quick:
        tiger = prompt = Size(500, 256, min(2, num_requests), 5, min(beam, 8), runs=2)
    else:
        tiger = Size(12_101, 256, num_requests, 20, beam, runs=20)
        prompt = Size(12_101, 256, num_requests, 60, beam, runs=20)
    small = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64} if quick else {}
    large = small or {"d_model": 256, "num_layers": 6, "num_heads": 8, "d_ff": 768}
    index = random_catalogue(tiger)
    return [
        Case("encoder_decoder", encoder_decoder(index, tiger, **small), index, tiger, device),
        Case("decoder_only", decoder_only(index, prompt, **large), index, prompt, device),
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--static", type=Path, help="a clone of STATIC's repository")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick or device.type == "cpu"
    rows: list[common.Row] = []
    for beam in BEAMS:
        for case in cases(quick, device, beam, 32):
            rows += case_rates(case)
        rows += [case_latency(case) for case in cases(quick, device, beam, 1)]
    if arguments.static is not None:
        for beam in BEAMS:
            items, requests = (2_000, 2) if quick else (1_000_000, 32)
            size = Size(items, 256, requests, 1, beam if not quick else 8, runs=2 if quick else 50)
            rows += case_static(arguments.static, size, device)
    return common.report(rows, arguments.json, device=str(device), measured=device.type == "cuda")


if __name__ == "__main__":
    main()
