"""Tuning modes: what trains and what does not, what is saved, merged and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from genrec.artifacts import load_artifact
from genrec.bundle import build_model, load_model, merge_bundle, save_model
from genrec.cli import main
from genrec.errors import ArtifactError, ConfigError, MismatchError, UserError
from genrec.item_index import ItemIndex
from genrec.models.base import pad_histories
from genrec.models.language_models import weights_fingerprint
from genrec.pipeline.config import load_run_config
from genrec.pipeline.run import Run
from genrec.recommender import Recommender
from genrec.testing.language_models import tiny_language_model
from genrec.testing.models import MAX_HISTORY, SIZES, greedy_items, small_codes, training_batch
from genrec.weights import model_arrays

INDEX = ItemIndex(tuple(f"i{n}" for n in range(24)), small_codes(), SIZES)
MODES = ("full", "lora", "prompt", "prefix", "embeddings_only", "frozen")
SEQUENCES = [(3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8), (7,)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    made = {f: str(tiny_language_model(root / f, f)) for f in ("llama", "gpt2", "t5", "bart")}
    other = tiny_language_model(root / "other", "llama")
    from genrec.models.language_models import load_language_model

    changed = load_language_model(str(other), "causal")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    changed.save_pretrained(other)
    return {**made, "other": str(other)}


def section(source: str, mode: str, **options: Any) -> dict[str, Any]:
    seq2seq = Path(source).name in ("t5", "bart")
    tuning = {"mode": mode, "num_virtual_tokens": 4, **options.pop("tuning", {})}
    name = "pretrained_seq2seq" if seq2seq else "pretrained_causal"
    apart = {"init_noise": 1.0}  # scores far apart, so that tests bite
    return {"name": name, "source": source, "max_history": 6, "tuning": tuning, **apart, **options}


def make(source: str, mode: str, **options: Any) -> Any:
    return build_model(section(source, mode, **options), INDEX, seed=0).eval()


def learn(model: Any, *, steps: int = 1, rate: float = 1e-2) -> float:
    """Take optimizer steps on a small batch of whole sequences; returns the last loss."""
    batch = training_batch(model, SEQUENCES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        output = model.train()(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    return float(output.loss.detach())


TRAINED = {
    "lora": ("code_", "lora_"),
    "prompt": ("code_", "virtual_PD"),
    "prefix": ("code_", "virtual_keys", "virtual_values"),
    "embeddings_only": ("code_",),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_what_the_mode_names_and_not_one_bit_of_anything_else(mode, family, folders):
    model = make(folders[family], mode, dropout=0.0)
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if mode == "frozen":
        assert learns == set()
        return
    if mode != "full":
        assert all(any(mark in name for mark in TRAINED[mode]) for name in learns)
        assert all(any(mark in name for name in learns) for mark in TRAINED[mode])
    learn(model, steps=2)
    moved = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert moved == learns
    base = {n for n in before if n.startswith("base.") and "lora_" not in n}
    if mode == "full":  # but for an untied head, by which nothing is scored
        assert base - moved == ({"base.lm_head.weight"} if family == "llama" else set())
    else:
        assert not base & moved


def test_lora_stands_on_every_linear_layer_but_the_head(folders):
    found = {}
    for family in ("llama", "gpt2", "t5"):
        model = make(folders[family], "lora", tuning={"rank": 3})
        names = [n for n, _ in model.base.named_parameters() if "lora_A" in n]
        found[family] = {n.split(".lora_A")[0].rpartition(".")[2] for n in names}
        ranks = {w.shape[0] for n, w in model.base.named_parameters() if "lora_A" in n}
        assert ranks == {3}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert found["llama"] == attention | {"gate_proj", "up_proj", "down_proj"}
    assert found["gpt2"] == {"c_attn", "c_proj", "c_fc"}
    assert found["t5"] == {"q", "k", "v", "o", "wi", "wo"}
    some = make(folders["llama"], "lora", tuning={"target_modules": ("q_proj", "v_proj")})
    assert sum("lora_A" in n for n, _ in some.named_parameters()) == 4
    with pytest.raises(ConfigError, match=r"got 'q_prj'.*Did you mean 'q_proj'"):
        make(folders["llama"], "lora", tuning={"target_modules": ("q_prj",)})


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_lora_starts_as_the_base(family, folders):
    batch = training_batch(make(folders[family], "frozen"), SEQUENCES)
    losses = {m: make(folders[family], m).loss(batch).loss.item() for m in ("frozen", "lora")}
    assert losses["lora"] == losses["frozen"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_merged_equals_unmerged(family, folders):
    model = make(folders[family], "lora")
    with torch.enable_grad():
        learn(model, steps=3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    whole = model.merged()
    batch = pad_histories([(3, 1), ()], MAX_HISTORY)
    bare = make(folders[family], "frozen").begin(batch)[0]
    mine, theirs = model.begin(batch)[0], whole.begin(batch)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(mine, bare, atol=1e-2)
    assert not any("lora_" in name for name in whole.state_dict())
    assert whole.config.tuning.mode == "full" and model.config.tuning.mode == "lora"
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())
    one, two = model.to_hugging_face(), whole.to_hugging_face()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["prompt", "prefix"])
def test_virtual_tokens_cannot_be_merged(mode, folders):
    with pytest.raises(UserError, match=f"merge: got a model with model.tuning.mode={mode}"):
        make(folders["llama"], mode).merged()


def test_a_prefix_starts_as_the_keys_and_values_of_real_tokens(folders):
    """So a prefix that has not learned anything answers as a hard prompt of these tokens."""
    torch.manual_seed(0)
    model = make(folders["gpt2"], "prefix", dropout=0.0)
    other = make(folders["gpt2"], "prompt", dropout=0.0)
    assert model.virtual_keys[0].shape[1] == 4 == len(other.virtual_PD)
    with torch.no_grad():
        own = model._read_virtual(other.virtual_PD.unsqueeze(0)).layers
        for layer, keys, values in zip(own, model.virtual_keys, model.virtual_values, strict=True):
            keys.copy_(layer.keys[0])
            values.copy_(layer.values[0])
        model.code_rows_CD.copy_(other.code_rows_CD)
        batch = pad_histories([(3, 1), (), (2, 2, 2)], MAX_HISTORY)
        one, two = model.begin(batch)[0], other.begin(batch)[0]
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_is_what_changed_and_loading_gives_the_same(mode, family, folders, tmp_path):
    model = make(folders[family], mode)
    if mode != "frozen":
        learn(model)
    artifact = save_model(tmp_path / "model", model, INDEX)
    names = set(artifact.arrays)
    if mode == "full":
        assert any(name.startswith("base.") for name in names)
        shutil.copytree(folders[family], tmp_path / "unused")
    else:
        assert all("lora_" in n for n in names if n.startswith("base."))
        assert "code_rows_CD" in names
    again = load_model(tmp_path / "model", INDEX)
    batch = pad_histories([(3, 1), ()], MAX_HISTORY)
    assert torch.equal(again.begin(batch)[0], model.begin(batch)[0])
    assert again.before == model.before and again.after == model.after
    fingerprint = artifact.extra["backbone"]["fingerprint"]
    assert fingerprint == (None if mode == "full" else weights_fingerprint(model.base))


def test_a_whole_model_needs_no_base_and_an_adapter_finds_it_elsewhere(
    folders, tmp_path, monkeypatch
):
    moved = shutil.copytree(folders["llama"], tmp_path / "moved")
    models = {mode: make(str(moved), mode) for mode in ("full", "lora")}
    for mode, model in models.items():
        save_model(tmp_path / mode, model, INDEX)
    save_model(tmp_path / "merged", models["lora"].merged(), INDEX)
    elsewhere = moved.rename(tmp_path / "elsewhere")
    batch = pad_histories([(3, 1), ()], MAX_HISTORY)
    expected = {mode: model.begin(batch)[0] for mode, model in models.items()}
    assert torch.equal(load_model(tmp_path / "full", INDEX).begin(batch)[0], expected["full"])
    merged = load_model(tmp_path / "merged", INDEX).begin(batch)[0]
    torch.testing.assert_close(merged, expected["lora"], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no folder with a model here"):
        load_model(tmp_path / "lora", INDEX)
    given = load_model(tmp_path / "lora", INDEX, base=str(elsewhere))
    assert torch.equal(given.begin(batch)[0], expected["lora"])
    (elsewhere / "tokenizer.json").unlink()  # the frame's tokens are saved
    monkeypatch.setenv("GENREC_BASE", str(elsewhere))
    found = load_model(tmp_path / "lora", INDEX)
    assert torch.equal(found.begin(batch)[0], expected["lora"])
    assert torch.equal(load_model(tmp_path / "full", INDEX).begin(batch)[0], expected["full"])
    with pytest.raises(UserError, match="saved with all its weights"):
        load_model(tmp_path / "full", INDEX, base=str(elsewhere))


def test_another_base_is_refused_with_both_fingerprints(folders, tmp_path):
    model = make(folders["llama"], "lora")
    save_model(tmp_path / "model", model, INDEX)
    with pytest.raises(MismatchError) as caught:
        load_model(tmp_path / "model", INDEX, base=folders["other"])
    mine = weights_fingerprint(model.base)
    assert mine in str(caught.value)
    theirs = weights_fingerprint(make(folders["other"], "lora").base)
    assert theirs in str(caught.value) and theirs != mine
    with pytest.raises(UserError, match="holds a t5 model"):
        load_model(tmp_path / "model", INDEX, base=folders["t5"])


def test_weights_of_another_architecture_are_refused(folders, tmp_path):
    save_model(tmp_path / "gpt2", make(folders["gpt2"], "full"), INDEX)
    artifact = load_artifact(tmp_path / "gpt2", kind="model")
    from genrec.weights import load_model_arrays

    model = make(folders["llama"], "full")
    before = model_arrays(model)
    with pytest.raises(ArtifactError, match="the weights do not fit this model"):
        load_model_arrays(model, artifact.arrays)
    assert all(np.array_equal(a, before[n]) for n, a in model_arrays(model).items())


@pytest.mark.parametrize(
    ("family", "mode", "rate"),
    [
        ("llama", "full", 1e-2),
        ("llama", "lora", 1e-2),
        ("t5", "full", 1e-2),
        ("t5", "lora", 1e-2),
        ("gpt2", "lora", 1e-2),
    ],
)
def test_modes_with_enough_weights_learn_sequences_by_heart(family, mode, rate, folders):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 24, rng.integers(3, 7)).tolist() for _ in range(12)]
    model = make(folders[family], mode, dropout=0.0, tuning={"rank": 16, "alpha": 32})
    batch = training_batch(model, sequences)
    prompts = pad_histories([s[:-1] for s in sequences], MAX_HISTORY)
    expected_BL = torch.from_numpy(small_codes()[[s[-1] for s in sequences]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    matched = 0.0
    for _ in range(12):
        for _ in range(15):
            loss = model.train().loss(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            codes_BL = greedy_items(model.eval(), prompts)
        matched = float((codes_BL == expected_BL).all(1).float().mean())
        if matched == 1.0:
            break
    assert matched > 0.95


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["prompt", "prefix", "embeddings_only"])
def test_modes_with_few_weights_learn_something(mode, family, folders):
    model = make(folders[family], mode, dropout=0.0)
    first = learn(model, rate=3e-2)
    assert learn(model, steps=40, rate=3e-2) < 0.8 * first


def test_text_and_virtual_tokens_carry_no_loss(folders):
    """Every target is an item: the sum of the loss over them is all there is."""
    batch = pad_histories([(3, 1, 4), (2,)], MAX_HISTORY)
    for mode in ("lora", "prompt", "prefix"):
        short = make(folders["llama"], mode, prefix="A:")
        output = short.loss(batch)
        assert int(output.num_targets) == 4
        with torch.no_grad():
            logits, _ = short.begin(pad_histories([()], MAX_HISTORY))
            first = torch.from_numpy(small_codes()[:, 0])
        firsts = short.loss(pad_histories([(3,)], MAX_HISTORY)).loss_sum
        assert float(firsts) >= float(-logits.log_softmax(-1)[0, first[3]])


def test_the_recommender_imports_peft_only_for_a_bundle_that_needs_it(folders, tmp_path, root):
    import subprocess
    import sys

    save_model(tmp_path / "full", make(folders["llama"], "full"), INDEX)
    INDEX.save(tmp_path / "index")
    code = (
        "import sys, genrec.recommender; from genrec.bundle import load_model;"
        "from genrec.item_index import ItemIndex;"
        f"load_model({str(tmp_path / 'full')!r}, ItemIndex.load({str(tmp_path / 'index')!r}));"
        "assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("mode", ["lora", "full", "frozen"])
def test_a_run_from_configuration_to_answers(
    mode, folders, small_config, tmp_path, caplog, monkeypatch
):
    config = yaml.safe_load(small_config.read_text())
    config["model"] = section(folders["llama"], mode, max_history=4)
    config["trainer"] |= {"epochs": 1, "validation_users": 8}
    config["evaluation"] |= {"baselines": []}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    with caplog.at_level("WARNING", logger="genrec"):
        Run(load_run_config(path), out=out, cache=tmp_path / "cache", device="cpu").execute()
    said = [r.message for r in caplog.records if "no weight of this PretrainedCausal" in r.message]
    assert bool(said) == (mode == "frozen")
    manifest = json.loads((out / "bundle" / "model" / "manifest.json").read_text())
    assert (manifest["extra"]["training"]["steps"] == 0) == (mode == "frozen")
    size = (out / "bundle" / "model" / "arrays.safetensors").stat().st_size
    assert (size > 60_000) == (mode == "full")
    answer = Recommender.from_pretrained(out / "bundle", device="cpu").recommend([["1", "2"]], k=3)
    assert answer.item_ids.shape == (1, 3) and (answer.probabilities >= 0).all()
    if mode == "lora":
        with pytest.raises(SystemExit) as done:
            main(["merge", str(out / "bundle"), "--out", str(tmp_path / "merged")])
        assert done.value.code == 0
        monkeypatch.setenv("GENREC_BASE", str(tmp_path / "nowhere"))
        merged = Recommender.from_pretrained(tmp_path / "merged", device="cpu")
        again = merged.recommend([["1", "2"]], k=3)
        assert again.item_ids.tolist() == answer.item_ids.tolist()
        np.testing.assert_allclose(again.scores, answer.scores, atol=1e-4)


def test_merging_what_stands_on_no_base_says_so(small_run, tmp_path):
    with pytest.raises(UserError, match="holds a DecoderOnly, which stands on no other"):
        merge_bundle(small_run / "bundle", tmp_path / "merged")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_configuration(mode, root):
    config = load_run_config(root / "configs" / "tuning" / f"{mode}.yaml")
    assert config.model.tuning.mode == mode


def test_every_tuning_configuration_is_checked(root):
    """What is no mode is a trainer: a second stage keeps all but it."""
    others = {p.stem for p in (root / "configs" / "tuning").glob("*.yaml")} - set(MODES)
    for name in others:
        config = load_run_config(root / "configs" / "tuning" / f"{name}.yaml")
        assert config.trainer.name == name
    assert "preference" in others
    second = load_run_config(root / "configs" / "tuning" / "preference.yaml").to_dict()
    first = load_run_config(root / "configs" / "demo-quick.yaml").to_dict()
    assert second["trainer"]["start_from"] == f"runs/{first['name']}"
    for section in ("seeds", "data", "features", "tokenizer", "index", "model"):
        assert second[section] == first[section]
