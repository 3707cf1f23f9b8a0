"""HSTU, times, users, truncation and order: what each option reads, and what it must not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.bundle import Bundle, load_model, save_model
from genrec.calibration.scores import IdentityCalibrator
from genrec.data import Catalog, Interactions
from genrec.errors import ConfigError, UserError
from genrec.inference import context_of, search
from genrec.item_index import ItemIndex
from genrec.models.base import Backbone, Batch, RequestContext, keep, pad_histories
from genrec.models.batch import kept_places
from genrec.models.decoder_only import DecoderOnly
from genrec.models.encoder_decoder import EncoderDecoder
from genrec.models.hierarchical import Hierarchical
from genrec.models.parallel import Parallel
from genrec.models.request_features import time_buckets
from genrec.recommender import Recommender
from genrec.testing.models import (
    HISTORIES,
    MAX_HISTORY,
    SIZES,
    BackboneContract,
    item_logprobs,
    small_codes,
)
from genrec.trainers.batching import TrainingExamples

SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "max_history": MAX_HISTORY}
DAY = 86_400
IDS = [f"i{n}" for n in range(24)]
INDEX = ItemIndex(tuple(IDS), small_codes(), SIZES)
TIMED = {
    "hstu": (Hierarchical, {"attention": "hstu", "time_bias": True}),
    "hstu items": (Hierarchical, {"attention": "hstu", "time_features": "gap", "items_from": 1}),
    "hstu parallel": (Parallel, {"attention": "hstu", "time_bias": True}),
    "hierarchical": (Hierarchical, {"time_features": "gap"}),
    "parallel": (Parallel, {"time_features": "gap"}),
    "decoder_only": (DecoderOnly, {"time_features": "gap"}),
}
ALL_ON = {"time_features": "gap_recency", "user_tokens": "hashed", "num_user_buckets": 50}


def make(cls: Any, **options: Any) -> Any:
    """A backbone in evaluation mode, its weights spread so that tests bite."""
    torch.manual_seed(0)
    model = cls.from_index(cls.Config(**{**SMALL, "dropout": 0.1, **options}), INDEX)
    return spread(model)


@torch.no_grad()
def spread(model: Backbone) -> Backbone:
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def times_of(histories: Any, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [10**9 + np.cumsum(rng.integers(1, 40 * DAY, len(h))) for h in histories]


class TestHSTU(BackboneContract):
    backbone = Hierarchical
    options: ClassVar = {
        **SMALL,
        "d_model": 32,
        "item_vectors": False,
        "attention": "hstu",
        "time_bias": True,
        "time_features": "gap_recency",
        "attention_dropout": 0.1,
    }


@pytest.mark.parametrize("cls", [Hierarchical, DecoderOnly, Parallel])
@torch.no_grad()
def test_options_that_are_off_add_nothing(cls: Any) -> None:
    model = make(cls)
    names = [name for name in model.state_dict() if name.startswith(("times.", "users."))]
    assert not names and not model.reads_times and model.user_rows(["a"]) is None
    plain = pad_histories(HISTORIES, MAX_HISTORY)
    context = RequestContext(times_of(HISTORIES), np.full(5, 2 * 10**9), np.arange(5))
    timed = pad_histories(HISTORIES, MAX_HISTORY, context=context)
    assert torch.equal(model.begin(plain)[0], model.begin(timed)[0])


@pytest.mark.parametrize("cls", [Hierarchical, DecoderOnly, Parallel])
@pytest.mark.parametrize("attention", [{}, {"attention": "hstu", "time_bias": True}])
@torch.no_grad()
def test_search_equals_loss_with_times_and_users(cls: Any, attention: dict[str, Any]) -> None:
    """The item after a history, asked for at its time, costs what the whole sequence adds."""
    if cls is DecoderOnly and attention:
        return
    model = make(cls, **ALL_ON, **attention)
    history, user = (3, 1, 4, 1), model.user_rows(["ann"])
    (times,) = times_of([(*history, 0)])
    found_N = item_logprobs(
        model,
        pad_histories(
            [history], MAX_HISTORY, context=RequestContext([times[:-1]], times[-1:], user)
        ),
    )[0]
    context = RequestContext([times], None, user)
    for item in (0, 9, 17):
        whole = pad_histories([(*history, item)], 9, context=context)
        # The time of a request is known for all positions of a sequence or for none.
        weights = torch.zeros_like(whole.history_BH, dtype=torch.float32)
        weights[:, -1] = 1.0
        nll = model.loss(replace(whole, weights=weights)).loss_sum
        torch.testing.assert_close(-nll, found_N[item], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", TIMED)
@torch.no_grad()
def test_times_count_but_not_the_targets_nor_later_ones(kind: str) -> None:
    cls, options = TIMED[kind]
    model = make(cls, **options)
    assert model.reads_times
    sequence = (3, 1, 4, 1, 5)
    (times,) = times_of([sequence])

    def losses(moved: int) -> list[float]:
        """Loss of each position, with one item's time changed."""
        changed = times.copy()
        changed[moved] += 1_000 * DAY
        batch = pad_histories([sequence], 9, context=RequestContext([changed]))
        eye = torch.eye(5)[:, None]
        return [float(model.loss(replace(batch, weights=row)).loss_sum) for row in eye]

    before = losses(moved=4)  # the last item is a target only
    batch = pad_histories([sequence], 9, context=RequestContext([times]))
    assert float(model.loss(batch).loss_sum) == pytest.approx(sum(before), abs=1e-4)
    third = losses(moved=2)
    assert third[:3] == pytest.approx(before[:3], abs=1e-5)
    assert abs(third[3] - before[3]) > 1e-4


@pytest.mark.parametrize("cls", [Hierarchical, DecoderOnly, Parallel])
@torch.no_grad()
def test_recency_is_the_time_of_the_request_where_it_is_known(cls: Any) -> None:
    model = make(cls, time_features="gap_recency")
    times = times_of([(3, 1)])

    def answer(now: int | None) -> torch.Tensor:
        now_B = None if now is None else np.array([now])
        context = RequestContext(times, now_B)
        return model.begin(pad_histories([(3, 1)], MAX_HISTORY, context=context))[0]

    last = int(times[0][-1])
    assert torch.equal(answer(None), answer(0))
    assert not torch.allclose(answer(None), answer(last + 60), atol=1e-4)
    assert not torch.allclose(answer(last + 60), answer(last + 90 * DAY), atol=1e-4)


def test_buckets_are_logarithmic_and_know_what_is_unknown() -> None:
    seconds = [1, 2, 60, DAY, 10**9]
    found = time_buckets(torch.tensor(seconds) + 10**9, torch.tensor(10**9)).tolist()
    assert found == [1 + math.floor(math.log(s) / 0.301) for s in seconds]
    assert time_buckets(torch.tensor([5, 0, 5]), torch.tensor([0, 5, 5])).tolist() == [0, 0, 1]
    assert torch.equal(
        time_buckets(torch.tensor(100), torch.tensor(7)),
        time_buckets(torch.tensor(7), torch.tensor(100)),
    )


@torch.no_grad()
def test_hstu_is_its_equations() -> None:
    """One head, one layer, written with loops."""
    model = make(Hierarchical, attention="hstu", time_bias=True, num_heads=1, num_layers=1)
    layer, x_TD = model.layers[0], torch.randn(4, 16)
    times_T = torch.tensor([0, 10**9, 10**9 + 50, 10**9 + DAY])
    buckets_TT = time_buckets(times_T[:, None], times_T)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (16,), eps=1e-6)

    silu = torch.nn.functional.silu
    gate, value, query, key = silu(norm(x_TD) @ layer.uvqk.weight.T).chunk(4, -1)
    expected = []
    for i in range(4):
        mixed = torch.zeros(16)
        for j in range(i + 1):
            bias = layer.distance_bias[i - j] + layer.time_bias[buckets_TT[i, j]]
            mixed += silu(query[i] @ key[j] + bias) / (MAX_HISTORY + 1) * value[j]
        expected.append(x_TD[i] + layer.out.weight @ (norm(mixed) * gate[i]))
    found = layer(x_TD[None], buckets_TT[None])[0]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"time_bias: got true .*Set model.attention=hstu"):
        make(Hierarchical, time_bias=True)
    with pytest.raises(ConfigError, match=r"history_order: got 'reversed' for a Hierarchical"):
        make(Hierarchical, history_order="reversed")
    with pytest.raises(UserError, match="user_tokens"):
        make(DecoderOnly, user_tokens="hashed").to_hugging_face()


# -- users ------------------------------------------------------------------------------------


def test_hashed_users_share_buckets_by_a_key_of_the_model() -> None:
    model, names = make(Hierarchical, user_tokens="hashed", num_user_buckets=7), list("abcdefghij")
    rows_B = model.user_rows([*names, None])
    assert rows_B[-1] == 0 and (rows_B[:-1] >= 1).all() and rows_B.max() <= 7
    assert model.user_rows(names[::-1]).tolist() == rows_B[:-1][::-1].tolist()
    torch.manual_seed(1)
    other = Hierarchical.from_index(model.config, INDEX)
    assert other.user_rows(names).tolist() != rows_B[:-1].tolist()


@pytest.mark.parametrize("cls", [Hierarchical, DecoderOnly, Parallel])
@torch.no_grad()
def test_learned_users_have_rows_others_share_one_and_no_id_is_kept(
    cls: Any, tmp_path: Path
) -> None:
    model = make(cls, user_tokens="learned")
    names = ["ann@example.org", "bob@example.org", "cy@example.org"]
    model.meet_users(names, np.array([True, True, False]))
    spread(model)
    rows_B = model.user_rows([*names, "dee", None])
    assert len({*rows_B[:2].tolist(), 0}) == 3 and rows_B[2:].tolist() == [0, 0, 0]
    batch = pad_histories([(3, 1)] * 5, MAX_HISTORY, context=RequestContext(users_B=rows_B))
    logits_BK = model.begin(batch)[0]
    assert not torch.allclose(logits_BK[0], logits_BK[1], atol=1e-3)
    assert not torch.allclose(logits_BK[0], logits_BK[2], atol=1e-3)
    torch.testing.assert_close(logits_BK[2], logits_BK[3])
    save_model(tmp_path / "model", model, INDEX)
    again = load_model(tmp_path / "model", INDEX)
    assert again.user_rows([*names, "dee", None]).tolist() == rows_B.tolist()
    assert torch.equal(again.begin(batch)[0], logits_BK)
    for path in (tmp_path / "model").iterdir():
        assert b"example.org" not in path.read_bytes()


def test_training_without_the_user_teaches_the_shared_row() -> None:
    model = make(Hierarchical, user_tokens="hashed", unknown_share=1.0).train()
    context = RequestContext(users_B=np.array([3, 4]))
    model.loss(pad_histories([(1, 2), (3,)], 9, context=context)).loss.backward()
    gradient = model.users.table.weight.grad
    assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0


# -- truncation and order ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    limit=st.integers(1, 6),
    truncation=st.sampled_from(["last", "first", "recent_and_first"]),
    order=st.sampled_from(["chronological", "reversed"]),
)
def test_what_is_kept_of_a_history(lengths, limit, truncation, order) -> None:
    histories = [list(range(length)) for length in lengths]
    head = {"last": 0, "first": limit, "recent_and_first": limit // 4}[truncation]
    whole = pad_histories(histories, 99)
    kept_BH = keep(whole.history_BH, limit, truncation, order)
    assert kept_BH.shape[1] <= limit
    for history, found in zip(histories, kept_BH.tolist(), strict=True):
        tail = history[len(history) - (limit - head) :] if limit > head else []
        expected = history if len(history) <= limit else history[:head] + tail
        assert kept_places(len(history), limit, truncation).tolist() == expected
        shown = expected[::-1] if order == "reversed" else expected
        assert found == shown + [-1] * (len(found) - len(shown))
    times_BH = torch.where(whole.history_BH >= 0, whole.history_BH * 10, 0)
    kept = replace(whole, times_BH=times_BH).kept(limit, truncation, order)
    assert torch.equal(kept.history_BH, kept_BH)
    assert torch.equal(kept.times_BH, torch.where(kept_BH >= 0, kept_BH * 10, 0))


@torch.no_grad()
def test_a_reversed_history_is_read_from_its_end() -> None:
    reverse = make(EncoderDecoder, history_order="reversed", truncation="recent_and_first")
    plain = make(EncoderDecoder)
    long = [1, 2, 3, 4, 5, 6, 7, 8]  # 6 are kept: one from the beginning, five from the end
    targets = torch.tensor([9])
    forth, back = torch.tensor([long]), torch.tensor([[8, 7, 6, 5, 4, 1]])
    assert torch.equal(reverse.begin(Batch(forth))[0], plain.begin(Batch(back))[0])
    assert torch.equal(
        reverse.loss(Batch(forth, targets)).loss, plain.loss(Batch(back, targets)).loss
    )


@torch.no_grad()
def test_truncation_is_the_models_wherever_a_history_comes_from() -> None:
    model, long = make(Hierarchical, truncation="first"), list(range(10))
    expected = model.begin(pad_histories([long[:MAX_HISTORY]], MAX_HISTORY))[0]
    assert torch.equal(model.begin(Batch(torch.tensor([long])))[0], expected)
    cut = pad_histories([long], MAX_HISTORY, truncation="first")
    assert torch.equal(model.begin(cut)[0], expected)


# -- the way there ----------------------------------------------------------------------------


def interactions() -> Interactions:
    rng = np.random.default_rng(0)
    lengths = np.array([12, 0, 4, 7])
    offsets = np.concatenate([[0], lengths.cumsum()])
    times = np.concatenate(times_of([range(n) for n in lengths]))
    rows = rng.integers(0, 24, lengths.sum()).astype(np.int32)
    splits = np.zeros(len(rows), np.uint8)
    splits[offsets[1:][lengths > 0] - 1] = 1
    return Interactions(rows, offsets, times, splits, 24)


@pytest.mark.parametrize("truncation", ["last", "first", "recent_and_first"])
@pytest.mark.parametrize("unit", ["target", "sequence"])
def test_training_batches_say_when_and_who(unit: Any, truncation: Any) -> None:
    events = interactions()
    model = make(Hierarchical, **ALL_ON, truncation=truncation)
    examples = TrainingExamples.for_model(model, events, unit)
    spans, batches = examples.plan(4, seed=0, epoch=0)
    place_of = {int(time): place for place, time in enumerate(events.timestamps)}
    users = model.user_rows(events.user_names)
    for chosen in batches:
        batch = examples.batch(spans, chosen)
        for row, number in enumerate(chosen):
            start, stop = int(spans.start[number]), int(spans.stop[number])
            user = int(events.user_rows[start])
            assert batch.users_B[row] == users[user]
            count = stop - start - (unit == "target")
            places = [place_of[int(t)] for t in batch.times_BH[row, :count]]
            assert events.item_rows[places].tolist() == batch.history_BH[row, :count].tolist()
            assert not batch.times_BH[row, count:].any()
            if unit == "sequence":
                assert places == list(range(start, stop))
                continue
            before = np.arange(events.offsets[user], stop - 1)
            kept = before[kept_places(len(before), MAX_HISTORY, truncation)]
            assert places == kept.tolist()
            assert batch.now_B[row] == events.timestamps[stop - 1]
            assert batch.target_B[row] == events.item_rows[stop - 1]


def test_no_examples_have_no_histories_and_no_times() -> None:
    nobody = interactions().examples("valid").select(np.empty(0, np.int64))
    assert nobody.histories() == [] and nobody.history_times() == []
    assert len(nobody.select(np.empty(0, np.int64))) == 0


def test_examples_of_a_data_set_carry_what_a_model_reads() -> None:
    events = interactions()
    examples = events.examples("valid")
    assert (
        examples.target_times.tolist() == events.timestamps[events.offsets[[1, 3, 4]] - 1].tolist()
    )
    part = examples.select(np.array([2, 0]))
    assert [len(t) for t in part.history_times()] == [6, 11]
    assert part.target_times.tolist() == examples.target_times[[2, 0]].tolist()
    assert context_of(make(Hierarchical), examples) is None
    context = context_of(make(Hierarchical, **ALL_ON), part)
    assert context.now_B is part.target_times
    assert [t.tolist() for t in context.times] == [t.tolist() for t in part.history_times()]
    assert context.users_B.tolist() == make(Hierarchical, **ALL_ON).user_rows(["3", "0"]).tolist()


def recommender(model: Backbone) -> Recommender:
    import polars as pl

    class Manifest:
        extra: ClassVar[dict[str, Any]] = {}
        fingerprint = ""

    catalog = Catalog(pl.DataFrame({"item_id": IDS}))
    calibrators = {"masked": IdentityCalibrator(), "unmasked": IdentityCalibrator()}
    parts = (catalog, INDEX, model, calibrators, 24, "renormalized", Manifest())
    return Recommender(Bundle(*parts), device="cpu")  # type: ignore[arg-type]


def test_a_recommender_takes_times_and_users() -> None:
    model = make(Hierarchical, **ALL_ON)
    service = recommender(model)
    histories, times = [["i3", "i1"], ["i4"]], [[10**9, 10**9 + 60], [10**9]]
    with pytest.raises(UserError, match=r"times: got none, but this model reads"):
        service.recommend(histories)
    with pytest.raises(UserError, match=r"times\[1\]: got 2 times for 1 items"):
        service.recommend(histories, times=[[1, 2], [1, 2]])
    with pytest.raises(UserError, match=r"times\[0\]: got -5"):
        service.score(histories, [["i1"]] * 2, times=[[-5, 2], [1]])
    with pytest.raises(UserError, match=r"users: got 1 for 2 histories"):
        service.recommend(histories, times=times, users=["ann"])
    now, users = [10**9 + DAY] * 2, ["ann", None]
    found = service.recommend(histories, 5, times=times, now=now, users=users)
    exact = service.score(
        histories, [list(r) for r in found.item_ids], times=times, now=now, users=users
    )
    np.testing.assert_allclose(found.scores, exact, atol=1e-4)
    lists = search(
        model,
        service._constraint,
        [np.array([3, 1]), np.array([4])],
        width=24,
        k=5,
        exclude=[np.array([3, 1]), np.array([4])],
        context=RequestContext([np.array(t) for t in times], np.array(now), model.user_rows(users)),
    )
    np.testing.assert_allclose(found.scores, lists.logprobs, atol=1e-5)
    others = service.recommend(histories, 5, times=times, now=now, users=["bob", None])
    assert not np.allclose(found.scores[0], others.scores[0], atol=1e-4)
    # An unknown item is skipped together with its time.
    gone = [["i3", "gone", "i1"], ["i4"]], [[10**9, 5, 10**9 + 60], [10**9]]
    again = service.recommend(gone[0], 5, times=gone[1], now=now, users=users)
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-5)


def test_a_recommender_whose_model_needs_none_answers_as_before() -> None:
    service = recommender(make(Hierarchical))
    plain = service.recommend([["i3", "i1"]], 5)
    given_too = service.recommend([["i3", "i1"]], 5, times=[[1, 2]], now=[3], users=["ann"])
    np.testing.assert_array_equal(plain.scores, given_too.scores)


def test_a_whole_run_reads_times_and_users(
    small_config: Path, small_cache: Path, tmp_path: Path
) -> None:
    """From the data set to the sample lists, through every stage that searches."""
    from genrec.pipeline.config import load_run_config
    from genrec.pipeline.run import Run

    model = "{name: hierarchical, max_history: 6, d_model: 16, num_layers: 1, num_heads: 2"
    options = "attention: hstu, time_bias: true, time_features: gap_recency, user_tokens: learned"
    changes = [
        f"model={model}, {options}}}",
        "trainer.epochs=1",
        "calibration={name: level_temperature}",
        "evaluation.masked=[true]",
    ]
    config = load_run_config(small_config, changes)
    Run(config, out=tmp_path / "run", cache=small_cache, device="cpu").execute(command="")
    service = Recommender.from_pretrained(tmp_path / "run" / "bundle", device="cpu")
    assert service.model.reads_times
    known = service.model.user_rows(["0", "1", "nobody"])
    assert known[0] != known[1] and (known[:2] > 0).all() and known[2] == 0
    times = [[10**9, 10**9 + 60]]
    found = [service.recommend([["1", "2"]], 5, times=times, users=[u]) for u in ("0", "1")]
    assert not np.array_equal(found[0].scores, found[1].scores)
