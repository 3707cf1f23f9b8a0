"""How much faster is our constrained beam search than `generate` with a prefix function?

Same weights, same beam, same renormalised scores, one process, one thread; the lists must be equal.
Weights are random: what is timed does not depend on them, and whether lists are equal is harder to
satisfy than on a trained model's. Under renormalised scoring our search stops running the model for
prefixes with one item left; "fixed shapes" is the variant for GPUs, which does so only where the
catalogue alone tells it. Beside the peer stands the floor: the search's own matrix products alone.

    python -m benchmarks.decoding [--quick] [--runs N] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.bare_gemm import replay_of
from genrec.decoding import Beams, CSRIndex, Filters, Scoring, beam_search
from genrec.decoding.hf import prefix_allowed_tokens_fn
from genrec.item_index import ItemIndex
from genrec.models import item_choice
from genrec.models.base import FIRST_TOKEN, START, Backbone, Batch
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.models.pretrained_decoder import PretrainedDecoder


@dataclass(frozen=True)
class Size:
    """What a case runs on."""

    num_items: int
    num_codes: int
    num_requests: int
    history: int
    beam: int
    runs: int
    num_levels: int = 4


def random_catalogue(size: Size, seed: int = 0) -> ItemIndex:
    """Return unique random codes."""
    rng = np.random.default_rng(seed)
    shape = (2 * size.num_items, size.num_levels)
    codes_NL = np.unique(rng.integers(0, size.num_codes, shape), axis=0)
    codes_NL = rng.permutation(codes_NL)[: size.num_items]
    ids = tuple(map(str, range(len(codes_NL))))
    return ItemIndex(ids, codes_NL, (size.num_codes,) * size.num_levels)


def random_batch(size: Size, seed: int = 1) -> Batch:
    """Return full histories, so that the peer's padding costs nothing."""
    rng = np.random.default_rng(seed)
    rows_BH = rng.integers(0, size.num_items, (size.num_requests, size.history))
    return Batch(torch.from_numpy(rows_BH))


def spread(model: Backbone, factor: float) -> Backbone:
    """Scale the weight matrices, so that scores lie further apart than rounding."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return model.eval()


@torch.no_grad()
def prompt_of(model: Backbone, batch: Batch) -> Tensor:
    """Return START and the histories' tokens, (B, T): what both backbones read."""
    tokens_BT = model.tokens_NL[batch.history_BH].flatten(1)
    return torch.nn.functional.pad(tokens_BT, (1, 0), value=START)


def peer(
    model: EncoderDecoder | DecoderOnly, index: ItemIndex, batch: Batch, beam: int
) -> Callable[[], Any]:
    """Return a call of `generate` on the same weights."""
    theirs: Any = model.to_hugging_face()
    theirs.to(model.device)
    prompt_BT = prompt_of(model, batch)
    prompt_length = 1 if isinstance(model, EncoderDecoder) else prompt_BT.shape[1]
    allowed = prefix_allowed_tokens_fn(index, first_token=FIRST_TOKEN, prompt_length=prompt_length)

    def run() -> Any:
        with torch.inference_mode():
            return theirs.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                num_beams=beam,
                num_return_sequences=beam,
                max_new_tokens=index.num_levels,
                prefix_allowed_tokens_fn=allowed,
                renormalize_logits=True,
                length_penalty=0.0,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )

    return run


def compare(beams: Beams, output: Any, index: ItemIndex, model: Backbone) -> dict[str, Any]:
    """Say how the lists of the two sides differ."""
    shape = beams.rows_Bk.shape
    tokens = output.sequences[:, -index.num_levels :].cpu() - model.level_offsets_L.cpu()
    rows_Bk = torch.from_numpy(index.rows_of_codes(tokens.numpy())).view(shape)
    scores_Bk = output.sequences_scores.view(shape)
    difference_Bk = (scores_Bk - beams.logprobs_Bk).abs()
    gaps = -torch.diff(beams.logprobs_Bk, dim=1)
    return {
        "equal_lists": int((rows_Bk == beams.rows_Bk).all(1).sum()),
        "lists": shape[0],
        "max_score_difference": float(difference_Bk.max()),
        "smallest_gap": float(gaps.min()),
    }


def case_against_generate(
    name: str, model: Any, index: ItemIndex, size: Size, static_shapes: bool | None = None
) -> common.Row:
    """Time one backbone against `generate`."""
    batch = random_batch(size)
    constraint = CSRIndex.from_index(index)
    options: Any = {"width": size.beam, "k": size.beam, "static_shapes": static_shapes}

    def ours() -> Beams:
        with torch.inference_mode():
            return beam_search(model, batch, constraint, **options)

    theirs = peer(model, index, batch, size.beam)
    details = compare(ours(), theirs(), index, model)
    equal = details["equal_lists"] == details["lists"]
    timings = common.alternate(ours, theirs, runs=size.runs, warm_up=0)
    return common.Row.of_timings(
        name, "hf_generate", *timings, equal, **details, beam=size.beam, items=len(index)
    )


def over_items(index: ItemIndex, size: Size) -> Hierarchical:
    """Return the default generator's backbone with random weights."""
    torch.manual_seed(0)
    config = Hierarchical.Config(
        max_history=size.history, d_model=128, activation="gelu", items_from=1, repeat_bias=True
    )
    return spread(Hierarchical.from_index(config, index), 2.0)


def search_of(model: Any, index: ItemIndex, size: Size) -> Callable[[], Beams]:
    """Return the search that is timed."""
    batch, constraint = random_batch(size), CSRIndex.from_index(index)

    def search() -> Beams:
        with torch.inference_mode():
            return beam_search(model, batch, constraint, width=size.beam, k=size.beam)

    return search


def case_over_items(index: ItemIndex, t5: Any, size: Size) -> common.Row:
    """Time the default generator's backbone against `generate` on another model.

    `hierarchical` has no twin in transformers, so the lists are not compared: the peer is the T5 of
    the same catalogue, what its users would run instead.
    """
    timings = common.alternate(
        search_of(over_items(index, size), index, size),
        peer(t5, index, random_batch(size), size.beam),
        runs=size.runs,
        warm_up=1,
    )
    baseline = "hf_generate, encoder_decoder"
    options = {"beam": size.beam, "items": len(index)}
    return common.Row.of_timings("hierarchical", baseline, *timings, None, **options)


def case_slices(name: str, index: ItemIndex, size: Size) -> common.Row:
    """Time item vectors read as slices, a product a group, against reading each row's by itself."""
    search = search_of(over_items(index, size), index, size)

    def slow_twin() -> Beams:
        with mock.patch.object(item_choice, "RUNS_BY_GROUP", ()):
            return search()

    equal = torch.equal(search().rows_Bk, slow_twin().rows_Bk)
    timings = common.alternate(search, slow_twin, runs=2 * size.runs)
    options = {"beam": size.beam, "items": len(index), "requests": size.num_requests}
    return common.Row.of_timings(name, "ours_vector_by_vector", *timings, equal, **options)


def case_pretrained(name: str, model: DecoderOnly, index: ItemIndex, size: Size) -> common.Row:
    """Time an unmodified causal LM of transformers in our search against its own `generate`."""
    batch, constraint = random_batch(size), CSRIndex.from_index(index)
    tokens = [
        torch.arange(count) + int(first)
        for first, count in zip(model.level_offsets_L, model.codebook_sizes, strict=True)
    ]
    language_model = PretrainedDecoder(model.to_hugging_face(), list, tokens)
    prompts = prompt_of(model, batch)

    def ours() -> Beams:
        with torch.inference_mode():
            return beam_search(language_model, prompts, constraint, width=size.beam, k=size.beam)

    theirs = peer(model, index, batch, size.beam)
    details = compare(ours(), theirs(), index, model)
    equal = details["equal_lists"] == details["lists"]
    timings = common.alternate(ours, theirs, runs=size.runs, warm_up=0)
    return common.Row.of_timings(name, "hf_generate", *timings, equal, **details, beam=size.beam)


def case_denied_items(model: Any, index: ItemIndex, size: Size, denied: int) -> common.Row:
    """Time a search with denied items against the same without; equal: none of them is returned."""
    batch, constraint = random_batch(size), CSRIndex.from_index(index)
    rng = np.random.default_rng(2)
    lists = [rng.choice(len(index), denied, replace=False) for _ in range(size.num_requests)]

    def search(filters: Filters | None) -> Beams:
        with torch.inference_mode():
            return beam_search(
                model, batch, constraint, width=size.beam, k=size.beam, filters=filters
            )

    found = search(Filters(exclude=lists)).rows_Bk.numpy()
    clean = not any(np.isin(found[b], lists[b]).any() for b in range(len(lists)))
    timings = common.alternate(
        lambda: search(Filters(exclude=lists)), lambda: search(None), runs=2 * size.runs
    )
    name = f"{denied} denied items a request"
    return common.Row.of_timings(name, "ours_without_filter", *timings, clean)


def case_bare_products(
    name: str, model: Any, index: ItemIndex, size: Size, scoring: Scoring
) -> common.Row:
    """Time a search against its matrix products alone; 1 / ratio is the distance from the floor."""
    batch, constraint = random_batch(size), CSRIndex.from_index(index)

    def search() -> Beams:
        with torch.no_grad():
            return beam_search(
                model, batch, constraint, width=size.beam, k=size.beam, scoring=scoring
            )

    replay, flops = replay_of(search)
    ours, floor = common.alternate(search, replay, runs=2 * size.runs)
    distance = ours.cpu / floor.cpu
    return common.Row.of_timings(
        name, "matrix_products_alone", ours, floor, None, gflop=flops / 1e9, distance=distance
    )


def case_latency(name: str, model: Any, index: ItemIndex, size: Size, count: int) -> common.Row:
    """Time single requests one by one: the median is ours, the 99th percentile theirs."""
    constraint = CSRIndex.from_index(index)
    batches = [random_batch(size, seed=seed) for seed in range(count)]

    def search(batch: Batch) -> Beams:
        with torch.inference_mode():
            return beam_search(model, batch, constraint, width=size.beam, k=size.beam)

    found = [common.timed(partial(search, batch)) for batch in [batches[0], *batches]]
    cpu, wall = np.array(found[1:]).T
    p50, p99 = (float(np.quantile(cpu, q)) for q in (0.5, 0.99))
    details = {f"wall_p{q}": float(np.quantile(wall, q / 100)) for q in (50, 99)}
    return common.Row(name, "its_own_p99", p50, p99, p99 / p50, "cpu_s", None, details)


def random_codes(size: Size, seed: int = 0) -> np.ndarray:
    """Return unique random codes in random order; fit for 10^7 items."""
    rng = np.random.default_rng(seed)
    bits = (size.num_codes - 1).bit_length()
    keys = rng.integers(0, 1 << (bits * size.num_levels), size.num_items + size.num_items // 8)
    keys = rng.permutation(np.unique(keys))[: size.num_items]
    shifts = bits * np.arange(size.num_levels - 1, -1, -1)
    return ((keys[:, None] >> shifts) & (size.num_codes - 1)).astype(np.int32)


def case_catalogue_size(
    model: Any, small: ItemIndex, large: CSRIndex, size: Size, scoring: Scoring
) -> common.Row:
    """Time the same model on a small and a large catalogue; ratio 1 means no difference.

    Under "level" every beam runs at every level in both. Under "renormalized" prefixes with one
    item left do not run, and the small catalogue has more of them.
    """
    batch = random_batch(size)
    batch = Batch(batch.history_BH % len(small))
    constraints = [large, CSRIndex.from_index(small)]

    def search(constraint: CSRIndex) -> Beams:
        with torch.inference_mode():
            return beam_search(
                model, batch, constraint, width=size.beam, k=size.beam, scoring=scoring
            )

    timings = common.alternate(
        lambda: search(constraints[0]), lambda: search(constraints[1]), runs=size.runs
    )
    name = f"{large.num_items:,} items, scoring {scoring}"
    return common.Row.of_timings(name, f"ours_with_{len(small)}_items", *timings, None)


def case_build(codes_NL: np.ndarray, num_codes: int) -> tuple[common.Row, CSRIndex]:
    """Build a large index, beside sorting its items with one key each, which any index must do."""
    sizes = (num_codes,) * codes_NL.shape[1]
    built: list[CSRIndex] = []
    keys_N = codes_NL.astype(np.int64) @ (num_codes ** np.arange(codes_NL.shape[1])[::-1])
    timings = common.alternate(
        lambda: built.append(CSRIndex.from_codes(codes_NL, sizes)),
        lambda: np.argsort(keys_N, kind="stable"),
        runs=1,
        warm_up=0,
    )
    num_items = len(codes_NL)
    name = f"build the index of {num_items:,} items"
    bytes_per_item = built[0].num_bytes / num_items
    row = common.Row.of_timings(
        name, "sorting_keys_alone", *timings, None, bytes_per_item=bytes_per_item
    )
    return row, built[0]


def case_index(index: ItemIndex) -> common.Row:
    """Build the index, beside the dictionary of a prefix function."""
    constraint = CSRIndex.from_index(index)
    timings = common.alternate(
        lambda: CSRIndex.from_index(index),
        lambda: prefix_allowed_tokens_fn(index, first_token=FIRST_TOKEN, prompt_length=1),
        runs=3,
        warm_up=0,
    )
    name = f"build the index of {len(index):,} items"
    size = constraint.num_bytes / len(index)
    return common.Row.of_timings(name, "dictionary", *timings, None, bytes_per_item=size)


def encoder_decoder(index: ItemIndex, size: Size, **options: Any) -> Backbone:
    """Return a random T5-style model of TIGER's size."""
    torch.manual_seed(0)
    config = EncoderDecoder.Config(max_history=size.history, **options)
    return spread(EncoderDecoder.from_index(config, index), 2.0)


def decoder_only(index: ItemIndex, size: Size, **options: Any) -> Any:
    """Return a random causal model."""
    torch.manual_seed(0)
    config = DecoderOnly.Config(max_history=size.history, **options)
    return spread(DecoderOnly.from_index(config, index), 4.0)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all cases; see the module's text."""
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side")
    arguments = parser.parse_args(argv)
    common.one_thread()
    quick, runs = arguments.quick, arguments.runs
    tiger = Size(12_101, 256, 32, 20, 20, runs=runs)
    prompt = Size(12_101, 256, 4, 60, 20, runs=runs)
    if quick:
        tiger, prompt = Size(2_000, 64, 4, 10, 10, runs=3), Size(2_000, 64, 2, 20, 10, runs=3)
    tiger_index, prompt_index = random_catalogue(tiger), random_catalogue(prompt)
    small = {"d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 128} if quick else {}
    large = small or {"d_model": 256, "num_layers": 6, "num_heads": 8, "d_ff": 768}
    t5, causal = (
        encoder_decoder(tiger_index, tiger, **small),
        decoder_only(prompt_index, prompt, **large),
    )
    wide = replace(tiger, beam=tiger.beam if quick else 50)
    one = Size(tiger.num_items, tiger.num_codes, 1, tiger.history, tiger.beam, tiger.runs)
    middle_index = random_catalogue(Size(20_000 if quick else 200_000, tiger.num_codes, 1, 1, 1, 1))
    small_index = random_catalogue(Size(2_000 if quick else 10_000, tiger.num_codes, 1, 1, 1, 1))
    wide_t5 = encoder_decoder(small_index, tiger, **small)
    large_codes = random_codes(Size(20_000 if quick else 10_000_000, tiger.num_codes, 1, 1, 1, 1))
    build, large_tree = case_build(large_codes, tiger.num_codes)
    del large_codes
    rows = [
        case_against_generate("encoder_decoder", t5, tiger_index, tiger),
        case_against_generate("encoder_decoder, one request", t5, tiger_index, one),
        case_against_generate("decoder_only", causal, prompt_index, prompt),
        case_over_items(tiger_index, t5, wide),
        case_slices("hierarchical, slices of item vectors", tiger_index, wide),
        case_slices(
            "hierarchical, slices, one request", tiger_index, replace(wide, num_requests=1)
        ),
        case_pretrained("causal LM of transformers, unmodified", causal, prompt_index, prompt),
        case_against_generate("encoder_decoder, fixed shapes", t5, tiger_index, tiger, True),
        case_bare_products("encoder_decoder", t5, tiger_index, tiger, "renormalized"),
        case_bare_products("encoder_decoder, all levels", t5, tiger_index, tiger, "level"),
        case_bare_products("decoder_only", causal, prompt_index, prompt, "renormalized"),
        case_latency("encoder_decoder, one by one", t5, tiger_index, one, 20 if quick else 100),
        case_denied_items(t5, tiger_index, tiger, 100 if quick else 1_000),
        case_catalogue_size(wide_t5, small_index, large_tree, tiger, "level"),
        case_catalogue_size(wide_t5, small_index, large_tree, tiger, "renormalized"),
        case_index(middle_index),
        build,
    ]
    return common.report(rows, arguments.json)


if __name__ == "__main__":
    main()
