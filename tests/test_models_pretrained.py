"""Language models from elsewhere as backbones: contract, vocabulary, equal to the library's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from genrec import assets
from genrec.bundle import load_model, save_model
from genrec.data import Catalog
from genrec.errors import AssetError, ConfigError, UserError
from genrec.item_index import ItemIndex
from genrec.models.base import Batch, pad_histories
from genrec.models.language_models import (
    find_place,
    frame_tokens,
    load_language_model,
    load_text_tokenizer,
    source_fingerprint,
    weights_fingerprint,
)
from genrec.models.pretrained_causal import PretrainedCausal
from genrec.models.pretrained_seq2seq import PretrainedSeq2Seq
from genrec.testing.language_models import UNUSED_ROWS, tiny_language_model
from genrec.testing.models import (
    HISTORIES,
    MAX_HISTORY,
    SIZES,
    BackboneContract,
    item_logprobs,
    recomputed_nll,
    small_codes,
)

INDEX = ItemIndex(tuple(f"i{n}" for n in range(24)), small_codes(), SIZES)
CAUSAL = ("llama", "gpt2", "qwen3", "gemma2")
SEQ2SEQ = ("t5", "bart")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """A function that gives the folder of a tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> str:
        key = f"{family}{sorted(changes.items())}"
        if key not in made:
            place = tmp_path_factory.mktemp("models") / family
            made[key] = tiny_language_model(place, family, **changes)
        return str(made[key])

    return folder


def make(source: str, **options: Any):
    """Return a backbone over the small index, in evaluation mode."""
    is_seq2seq = any(f"/{family}" in source for family in SEQ2SEQ)
    cls: Any = PretrainedSeq2Seq if is_seq2seq else PretrainedCausal
    torch.manual_seed(0)
    apart = {"init_noise": 1.0}  # scores far apart, so that tests bite
    options = {"max_history": MAX_HISTORY, "tuning": {"mode": "full"}, **apart, **options}
    return cls.from_index(cls.Config(source=source, **options), INDEX).eval()


class PretrainedContract(BackboneContract):
    """The whole contract; `family` and `changes` are of the tiny model."""

    __test__ = False
    family: ClassVar[str]
    changes: ClassVar[dict[str, Any]] = {}
    no_dropout: ClassVar = {"dropout": 0.0}

    @pytest.fixture(autouse=True)
    def _source(self, family_folder):
        options = {"source": family_folder(self.family, **self.changes)}
        options |= {"tuning": {"mode": "full"}, "prefix": "Items:", "init_noise": 1.0}
        type(self).options = options


class TestLlamaTied(PretrainedContract):
    __test__ = True
    backbone = PretrainedCausal
    family = "llama"
    changes: ClassVar = {"tie_word_embeddings": True}


class TestT5(PretrainedContract):
    __test__ = True
    backbone = PretrainedSeq2Seq
    family = "t5"


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "bart"])
@torch.no_grad()
def test_every_family_searches_as_it_recomputes(family, family_folder):
    model = make(family_folder(family))
    assert model.tied == (family != "qwen3")
    found_BN = item_logprobs(model, pad_histories(HISTORIES[:3], MAX_HISTORY))
    for history, found_N in zip(HISTORIES[:3], found_BN, strict=True):
        for item in (0, 7, 23):
            torch.testing.assert_close(
                found_N[item], -recomputed_nll(model, history, item), atol=1e-4, rtol=0
            )
    assert found_BN.std() > 0.1


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_rows_share_a_requests_keys_or_get_copies_with_the_same_answers(family, family_folder):
    model = make(family_folder(family))
    assert model._shares_keys
    batch = pad_histories([(3, 1, 4), (), (2,)], MAX_HISTORY)
    shared_BN = item_logprobs(model, batch)
    _, state = model.begin(batch)
    _, state = model.step(
        torch.zeros(12, dtype=torch.int64), state, torch.arange(3).repeat_interleave(4)
    )
    assert len(state.cache.cross_attention_cache.layers[0].keys) == 3
    model._shares_keys = False
    torch.testing.assert_close(item_logprobs(model, batch), shared_BN, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@torch.no_grad()
def test_exported_to_the_library_it_answers_the_same(family, family_folder):
    """The codes as plain rows of a plain model: text in, the codes' logits out."""
    source = family_folder(family)
    model = make(source, prefix="Items:")
    model.code_rows_CD.normal_()
    plain = model.to_hugging_face()
    tokenizer = model.vocabulary.extend(load_text_tokenizer(source))
    codes = [f"<code_{n}_{c}>" for row in (3, 1) for n, c in enumerate(INDEX.codes[row])]
    text = tokenizer("Items:" + "".join(codes), return_tensors="pt")["input_ids"]
    logits_BK, _ = model.begin(pad_histories([[3, 1]], MAX_HISTORY))
    if family in SEQ2SEQ:
        start = torch.full((1, 1), plain.config.decoder_start_token_id)
        theirs = plain(input_ids=text, decoder_input_ids=start).logits[0, -1]
    else:
        theirs = plain(input_ids=text).logits[0, -1]
    first = model.first_token
    torch.testing.assert_close(logits_BK[0], theirs[first : first + SIZES[0]], atol=1e-4, rtol=0)
    raw_BK, _ = model.over_vocabulary().begin(pad_histories([[3, 1]], MAX_HISTORY))
    expected = theirs.log_softmax(-1)[first : first + SIZES[0]]
    torch.testing.assert_close(raw_BK[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "starts", "ends"),
    [
        ("llama", ["<s>"], []),
        ("gpt2", [], []),
        ("qwen3", [], []),
        ("t5", [], ["</s>"]),
        ("bart", ["<s>"], ["</s>"]),
    ],
)
def test_a_history_stands_in_the_tokenizers_own_frame(family, starts, ends, family_folder):
    tokenizer = load_text_tokenizer(family_folder(family))
    before, after = frame_tokens(tokenizer, "Items:")
    text = tokenizer("Items:", add_special_tokens=False)["input_ids"]
    assert before == [*tokenizer.convert_tokens_to_ids(starts), *text]
    assert after == tokenizer.convert_tokens_to_ids(ends)
    assert frame_tokens(tokenizer, "")[0] == tokenizer.convert_tokens_to_ids(starts)
    model = make(family_folder(family), prefix="Items:")
    tokens_BT, lengths_B = model.framed(torch.tensor([[3, 1], [2, -1]]), after=True)
    for row, items in ((0, [3, 1]), (1, [2])):
        codes = model.tokens_NL[items].flatten().tolist()
        assert tokens_BT[row, : lengths_B[row]].tolist() == [*before, *codes, *after]


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_codes_stand_behind_the_models_rows_at_the_offsets_of_the_index(family, family_folder):
    source = family_folder(family)
    model, tokenizer = make(source), load_text_tokenizer(source)
    rows = load_language_model(source, model.kind).get_input_embeddings().weight.shape[0]
    assert model.first_token == rows
    assert rows - len(tokenizer) == (UNUSED_ROWS if family == "qwen3" else 0)
    assert np.array_equal(model.tokens_NL.numpy(), INDEX.tokens(rows))
    extended = model.vocabulary.extend(tokenizer)
    assert len(extended) == rows + INDEX.num_tokens and len(tokenizer) <= rows
    written = "".join(f"<code_{n}_{c}>" for n, c in enumerate(INDEX.codes[5]))
    read = extended(f"a{written}b", add_special_tokens=False)["input_ids"]
    assert [t for t in read if t >= rows] == model.tokens_NL[5].tolist()
    assert written in extended.decode(read).replace(" ", "")
    assert len(model.vocabulary.names) == len(set(model.vocabulary.names)) == INDEX.num_tokens


def test_a_shared_vocabulary_has_one_token_per_word(family_folder):
    codes = np.array([[1, 0], [2, 3], [3, 0]])
    index = ItemIndex(("a", "b", "c"), codes, (4, 4), shared_vocabulary=True)
    config = PretrainedCausal.Config(source=family_folder("llama"))
    model = PretrainedCausal.from_index(config, index)
    assert model.vocabulary.names == [f"<code_{n}>" for n in range(4)]
    assert model.num_codes == len(model.code_rows_CD) == 4


def test_where_the_rows_of_the_codes_start(family_folder):
    source = family_folder("llama")
    old_VD = load_language_model(source, "causal").get_input_embeddings().weight.detach()
    mean = make(source, init="mean", init_noise=0.0).code_rows_CD
    torch.testing.assert_close(mean, old_VD.mean(0).expand_as(mean))
    scattered = make(source, init="mean").code_rows_CD
    assert 0.5 < float(((scattered - mean).std() / old_VD.std()).detach()) < 1.5
    again = make(source, init="mean").code_rows_CD
    assert torch.equal(scattered, again)
    random = make(source, init="random").code_rows_CD
    assert 0.5 < float((random.std() / old_VD.std()).detach()) < 1.5


def titled(titles: list[str], vectors: np.ndarray | None = None) -> Catalog:
    import polars as pl

    table = pl.DataFrame({"item_id": list(INDEX.item_ids), "title": titles})
    return Catalog(table, vectors)


def test_rows_start_from_descriptions(family_folder):
    source = family_folder("gpt2")
    model = make(source, init="text", init_noise=0.0)
    model.start_from(titled(["ab"] + ["zz"] * 23))
    tokenizer = load_text_tokenizer(source)
    old_VD = model.base.get_input_embeddings().weight.detach()

    def mean(text: str) -> torch.Tensor:
        return old_VD[tokenizer(text)["input_ids"]].mean(0)

    level0 = INDEX.codes[:, 0]
    with_first = (level0 == level0[0]).sum()
    expected = (mean("ab") + (with_first - 1) * mean("zz")) / with_first
    row = model.code_rows_CD[level0[0]]
    torch.testing.assert_close(row, expected.to(row.dtype), atol=1e-5, rtol=0)
    other = model.code_rows_CD[next(c for c in level0 if c != level0[0])]
    torch.testing.assert_close(other, mean("zz"), atol=1e-5, rtol=0)


def test_rows_start_from_vectors(family_folder):
    """Codes with near vectors get near rows."""
    source = family_folder("gpt2")
    centres = np.array([[0, 0], [0.1, 0], [9, 9], [9, 9.1]], np.float32)
    vectors = np.tile(centres[INDEX.codes[:, 0]], (1, 20))
    model = make(source, init="codebook")
    model.start_from(titled(["a"] * 24, vectors))
    rows = model.code_rows_CD[: SIZES[0]].detach()
    near, far = (rows[0] - rows[1]).norm(), (rows[0] - rows[2]).norm()
    assert near < 0.1 * far and (rows[2] - rows[3]).norm() < 0.1 * far
    with pytest.raises(UserError, match="init: got 'codebook' without item vectors"):
        model.start_from(titled(["a"] * 24))
    with pytest.raises(UserError, match="catalogue of 2 items"):
        model.start_from(titled(["a"] * 24).select([0, 1]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/no-such-model", "no folder with a model here"),
        ("asset:nothing", "asset 'nothing': expected one of"),
    ],
)
def test_an_unknown_model_says_what_to_do(source, message):
    with pytest.raises(UserError, match=message):
        PretrainedCausal.from_index(PretrainedCausal.Config(source=source), INDEX)


def test_a_model_of_the_other_kind_is_refused(family_folder):
    for cls, family, other in (
        (PretrainedCausal, "t5", "pretrained_seq2seq"),
        (PretrainedSeq2Seq, "llama", "pretrained_causal"),
    ):
        with pytest.raises(UserError, match=f"Set model.name={other}"):
            cls.from_index(cls.Config(source=family_folder(family)), INDEX)


def test_a_folder_without_tokenizer_is_refused(family_folder, tmp_path):
    load_language_model(family_folder("llama"), "causal").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        make(str(tmp_path))


def test_gguf_without_its_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"")
    monkeypatch.setenv("GENREC_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="genrec\\[gguf\\]"):
        find_place(str(tmp_path))


def test_quantization_without_its_library_is_refused(family_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, library in (("bnb-nf4", "bitsandbytes"), ("torchao-int8", "torchao")):
        with pytest.raises(ConfigError, match=f"needs the package {library}"):
            make(family_folder("llama"), quantization=name, tuning={"mode": "lora"})
    with pytest.raises(ConfigError, match=r"with model\.tuning\.mode=full"):
        make(family_folder("llama"), quantization="bnb-int8")


@pytest.mark.parametrize("kind", ["bnb-int8", "bnb-nf4", "torchao-int8"])
@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_quantized_bases_train_search_save_and_load(kind, mode, family_folder, tmp_path):
    pytest.importorskip("torchao" if kind.startswith("torchao") else "bitsandbytes")
    options = {"tuning": {"mode": mode}, "prefix": "Items:"}
    plain = make(family_folder("llama"), **options)
    model = make(family_folder("llama"), quantization=kind, **options)
    batch = pad_histories([(3, 1, 4), (2,)], MAX_HISTORY)
    before = weights_fingerprint(model.base)
    first = model.begin(batch)[0]
    assert not torch.equal(first, plain.begin(batch)[0])  # it is quantized
    assert torch.corrcoef(torch.stack([first, plain.begin(batch)[0]]).flatten(1))[0, 1] > 0.8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train().loss(batch).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert weights_fingerprint(model.base) == before
    save_model(tmp_path / "model", model.eval(), INDEX)
    again = load_model(tmp_path / "model", INDEX).eval()
    assert torch.equal(again.begin(batch)[0], model.begin(batch)[0])
    if mode == "lora":
        with pytest.raises(UserError, match="expected a plain"):
            again.merged()


def test_no_token_to_predict_the_first_item_from_is_refused(family_folder):
    with pytest.raises(ConfigError, match=r"model\.prefix: got no text"):
        make(family_folder("gpt2"), prefix="")
    make(family_folder("llama"), prefix="")  # it has a start token of its own
    virtual = {"mode": "prompt", "num_virtual_tokens": 2}
    model = make(family_folder("gpt2"), prefix="", tuning=virtual)
    assert model.begin(Batch(torch.empty((1, 0), dtype=torch.int64)))[0].isfinite().all()


def test_a_history_longer_than_the_model_reads_is_refused(family_folder):
    with pytest.raises(ConfigError, match=r"reads 256\. Set model\.max_history=") as caught:
        make(family_folder("gpt2"), max_history=200, prefix="Items:")
    fits = int(str(caught.value).split("max_history=")[1].split()[0])
    assert make(family_folder("gpt2"), max_history=fits, prefix="Items:").config.max_history == fits
    with pytest.raises(ConfigError):
        make(family_folder("gpt2"), max_history=fits + 1, prefix="Items:")


def test_the_key_of_a_local_source_changes_with_its_files(family_folder, tmp_path):
    folder = tiny_language_model(tmp_path / "copy", "llama")
    before = source_fingerprint(str(folder))
    assert before == source_fingerprint(family_folder("llama"))
    config = PretrainedCausal.Config(source=str(folder))
    assert config.reads(titled(["a"] * 24)) == {"base": before}
    tiny_language_model(folder, "llama", num_hidden_layers=1)
    assert source_fingerprint(str(folder)) != before
    assert source_fingerprint("some/name") is None


def test_dropout_of_the_base_is_an_option(family_folder):
    asked = make(family_folder("t5"), dropout=0.25)
    rates = {m.p for m in asked.base.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    kept = make(family_folder("t5"))
    assert {m.p for m in kept.base.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_gradient_checkpointing_changes_nothing_but_memory(family_folder):
    gradients = []
    for option in (False, True):
        model = make(family_folder("llama")).train()
        model.checkpoint_gradients(option)
        model.loss(pad_histories([(3, 1, 4), (2,)], MAX_HISTORY)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        make(family_folder("llama"), tuning={"mode": "prefix"}).checkpoint_gradients(True)


def test_bfloat16_bases_train_and_search(family_folder):
    for family in ("llama", "t5"):
        model = make(family_folder(family), dtype="bfloat16", tuning={"mode": "lora"}).train()
        targets = [4, 5] if family == "t5" else None
        model.loss(pad_histories([(3, 1, 4), (2,)], MAX_HISTORY, targets=targets)).loss.backward()
        assert model.base.dtype == torch.bfloat16
        assert model.code_rows_CD.grad.dtype == torch.float32
        assert model.eval().begin(pad_histories([(3,)], MAX_HISTORY))[0].dtype == torch.float32


SMOLLM2 = assets.find("smollm2") if "smollm2" in assets.ASSETS else None


@pytest.fixture
def smollm2():
    """A function that gives SmolLM2-135M with its real weights, in a tuning mode."""
    if SMOLLM2 is None:
        pytest.skip("run `genrec assets fetch smollm2` first")
    if not list((assets.assets_dir() / "converted").glob("*")):
        pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")

    def in_mode(mode: str) -> PretrainedCausal:
        return make("asset:smollm2", prefix="Items:", init_noise=0.1, tuning={"mode": mode})

    return in_mode


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "prompt", "prefix", "embeddings_only"])
def test_smollm2_learns_without_changing_its_weights_and_loads(mode, smollm2, tmp_path):
    model = smollm2(mode)
    before = weights_fingerprint(model.base)
    batch = pad_histories([(3, 1, 4, 1, 5), (9, 2, 6)], MAX_HISTORY)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        output = model.train().loss(batch)
        losses.append(float(output.loss.detach()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    print(f"{mode}: {[round(loss, 2) for loss in losses]} nats an item")
    assert losses[-1] < losses[0]
    assert weights_fingerprint(model.base) == before
    save_model(tmp_path / "model", model.eval(), INDEX)
    loaded = load_model(tmp_path / "model", INDEX).eval()
    assert torch.equal(loaded.begin(batch)[0], model.begin(batch)[0])


@pytest.mark.slow
def test_smollm2_leaves_as_a_plain_model_of_the_library(smollm2, tmp_path):
    model = smollm2("lora")
    model.to_hugging_face().save_pretrained(tmp_path)
    logits_BK, _ = model.begin(pad_histories([(3, 1)], MAX_HISTORY))
    again = load_language_model(str(tmp_path), "causal")
    tokens_BT, _ = model.framed(torch.tensor([[3, 1]]), after=False)
    theirs = again(input_ids=tokens_BT).logits[0, -1, model.first_token :][: SIZES[0]]
    torch.testing.assert_close(logits_BK[0], theirs, atol=1e-3, rtol=0)
