"""How fast is the recorded search on a GPU, beside `generate` and beside STATIC?

Requests a second at wide beams, latency of single requests, what bfloat16 changes, a CUDA graph
beside `torch.compile(mode="reduce-overhead")`, and the search without a model beside the STATIC
method (arXiv 2602.22647) on the same catalogue. Wall seconds, with the device synchronised around
each run. Weights are random, and nothing is downloaded. On a CPU it runs too, eagerly and at small
sizes: that tests the benchmark and measures nothing.

    python -m benchmarks.decoding_gpu [--quick] [--static CHECKOUT] [--json FILE]

CHECKOUT is a clone of STATIC's repository (`static_decoding` in it is imported as it is). A case
that fails, or that would begin after `BUDGET_S`, is left out; the JSON says why, and is written
after each case. It needs torch, transformers, pydantic, PyYAML and rich, and no installed genrec.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
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
from genrec.decoding.beam import Search
from genrec.decoding.captured import CapturedSearch
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch

BEAMS = (50, 256)
BUDGET_S = 450.0
"""No case begins later, so that the whole fits into ten minutes."""


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

    @cached_property
    def search(self) -> CapturedSearch:
        """The search in float32."""
        return self.captured()

    def recorded(self) -> Beams:
        """Search by replaying a graph."""
        return self.search(self.histories, width=self.size.beam, k=self.size.beam)

    def captured(self, **options: Any) -> CapturedSearch:
        """Return a search that records its graphs."""
        limits: Any = {"max_requests": self.size.num_requests, "max_history": self.size.history}
        return CapturedSearch(self.model, self.constraint, Batch, **limits, **options)

    def captured_anew(self) -> Beams:
        """Record the graph again and search."""
        self.search.clear()
        return self.recorded()

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


def _name(case: Case) -> str:
    count = "one request" if case.size.num_requests == 1 else f"{case.size.num_requests} requests"
    return f"{count}, beam {case.size.beam}"


def case_generate(case: Case) -> list[common.Row]:
    """The recorded search beside `generate`: medians, with p50 and p99 of both in the details."""
    theirs = peer(case.model, case.index, case.batch, case.size.beam)
    found = compare(_on_cpu(case.recorded()), _outputs_on_cpu(theirs()), case.index, case.model)
    equal = found["equal_lists"] == found["lists"]
    alone = case.size.num_requests == 1
    ours = seconds(case.recorded, case.device, case.size.runs * (20 if alone else 1), 3)
    others = seconds(theirs, case.device, 10 if alone else 2, 1)
    return [case.row(_name(case), "hf_generate", ours, others, equal=equal, **found)]


def case_eager(case: Case) -> list[common.Row]:
    """The same search without a graph: what recording is good for."""
    ours = seconds(case.recorded, case.device, case.size.runs, 3)
    others = seconds(case.eager, case.device, case.size.runs, 2)
    return [case.row(_name(case), "ours_eager", ours, others)]


def case_half(case: Case) -> list[common.Row]:
    """bfloat16 beside float32, and how much of the lists they share."""
    half, width = case.captured(autocast=torch.bfloat16), case.size.beam

    def in_half() -> Beams:
        return half(case.histories, width=width, k=width)

    pairs = zip(case.recorded().rows_Bk.tolist(), in_half().rows_Bk.tolist(), strict=True)
    shared = [len(np.intersect1d(a, b)) / width for a, b in pairs]
    details = {"overlap": float(np.mean(shared)), "lowest_overlap": float(min(shared))}
    ours = seconds(in_half, case.device, case.size.runs, 2)
    others = seconds(case.recorded, case.device, case.size.runs, 2)
    return [case.row(f"{_name(case)}, bfloat16", "ours_float32", ours, others, **details)]


def case_compiled(case: Case) -> list[common.Row]:
    """Our graph beside `torch.compile` of the same search, and how long each takes to make."""
    width = case.size.beam

    def search(rows_BH: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_BK, state = case.model.begin(Batch(rows_BH))
            plain = Search(case.constraint, static_shapes=True)
            beams = plain.run(case.model, logits_BK, state, width=width, k=width)
        return beams.rows_Bk, beams.logprobs_Bk

    on_gpu = case.device.type == "cuda"
    options: Any = {"mode": "reduce-overhead"} if on_gpu else {"backend": "eager"}
    compiled = torch.compile(search, fullgraph=True, dynamic=False, **options)

    def theirs() -> Tensor:
        rows_Bk, _ = compiled(torch.tensor(case.histories).to(case.device))
        return rows_Bk.clone()

    making = [sum(seconds(make, case.device, 3, 0)) for make in (case.captured_anew, theirs)]
    equal = torch.equal(theirs().cpu(), case.recorded().rows_Bk.cpu())
    ours = seconds(case.recorded, case.device, case.size.runs, 2)
    others = seconds(theirs, case.device, case.size.runs, 2)
    details = {"ours_first_three_s": making[0], "theirs_first_three_s": making[1]}
    name = f"{_name(case)}, first calls in the details"
    return [case.row(name, "torch_compile", ours, others, equal=equal, **details)]


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


def case_static(checkout: Path | None, size: Size, device: torch.device) -> list[common.Row]:
    """The search alone, on random logits normalised over the level, beside STATIC's."""
    if checkout is not None:
        sys.path.insert(0, str(checkout))
    builder = importlib.import_module("static_decoding.csr_utils")
    decoding = importlib.import_module("static_decoding.decoding_pt")
    codes_NL = random_codes(size)
    order = np.lexsort(codes_NL.T[::-1])
    # By place: the name of the third argument (dense levels) differs between versions.
    packed, pointers, branches, start_mask, dense_mask, dense_states = builder.build_static_index(
        codes_NL[order], size.num_codes, 2
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


class Report:
    """Rows so far, and what was left out and why; the JSON is written after each case.

    Args:
        path: of the JSON; None writes none.
        device: what the cases run on.
        budget_s: seconds after which no case begins.
    """

    def __init__(self, path: Path | None, device: torch.device, budget_s: float = BUDGET_S) -> None:
        self.path, self.budget_s = path, budget_s
        on_gpu = device.type == "cuda"
        self.about = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "measured": on_gpu,
        }
        self.rows: list[common.Row] = []
        self.skipped: list[dict[str, str]] = []
        self.began = time.monotonic()

    def add(self, name: str, case: Callable[[], list[common.Row]]) -> None:
        """Run a case; one that fails leaves the others their figures."""
        try:
            if time.monotonic() - self.began > self.budget_s:
                raise TimeoutError(f"{self.budget_s:.0f} s were over")
            self.rows += case()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.skipped.append({"case": name, "reason": f"{type(error).__name__}: {lines[0]}"})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.finish()

    def finish(self) -> dict[str, Any]:
        """Print the rows, write the JSON, and return it."""
        seconds_ = round(time.monotonic() - self.began, 1)
        more = {**self.about, "skipped": self.skipped, "seconds": seconds_}
        return common.report(self.rows, self.path, **more)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--static", type=Path, help="a clone of STATIC's repository")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick or device.type == "cpu"
    report = Report(arguments.json, device)
    plan = ((32, (case_generate, case_eager, case_half)), (1, (case_generate, case_half)))
    for beam in BEAMS:
        for num_requests, measures in plan:
            for case in cases(quick, device, beam, num_requests):
                for measure in measures:
                    name = f"{measure.__name__}: {case.name}, {_name(case)}"
                    report.add(name, partial(measure, case))
    for beam in BEAMS:
        items, requests = (2_000, 2) if quick else (1_000_000, 32)
        size = Size(items, 256, requests, 1, 8 if quick else beam, runs=2 if quick else 50)
        name = f"case_static: {items:,} items, beam {beam}"
        report.add(name, partial(case_static, arguments.static, size, device))
    for case in cases(quick, device, BEAMS[0], 1 if quick else 32):  # last: compiling takes minutes
        report.add(f"case_compiled: {case.name}, {_name(case)}", partial(case_compiled, case))
    return report.finish()


if __name__ == "__main__":
    main()
