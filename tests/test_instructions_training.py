"""Do language models learn mixtures of instructions, from responses only, and say how each task
goes?"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from accelerate import Accelerator

from genrec.asking import Asker
from genrec.bundle import build_model
from genrec.cli import main
from genrec.config import parse
from genrec.data import Catalog
from genrec.data.synthetic import planted
from genrec.decoding import CSRIndex
from genrec.errors import ConfigError
from genrec.item_index import ItemIndex
from genrec.models.base import pad_histories
from genrec.models.responses import collate_responses
from genrec.pipeline.config import load_run_config
from genrec.pipeline.run import Run
from genrec.recommender import Recommender
from genrec.testing.language_models import tiny_language_model
from genrec.trainers.instructions import InstructionTrainer

WORLD = planted(16, 24, 0, branching=2, length=(4, 6))
NAMES = ["".join(letters) for letters in product("bdfg", "ao", "lr")]
TABLE = WORLD.catalog.table.with_columns(pl.Series("title", NAMES))
DATA = replace(WORLD, catalog=Catalog(TABLE, WORLD.catalog.vectors))
TRAINING = DATA.interactions.training()
CODES = np.stack([np.arange(16) // 4, np.arange(16) % 4], 1).astype(np.int32)
INDEX = ItemIndex(tuple(DATA.catalog.item_ids), CODES, (4, 4))
SHORT = {
    "sequential": ("S{history}>", "{item}"),
    "item_to_index": ("I{title}>", "{item}"),
    "index_to_item": ("T{item}>", "{title}"),
    "item_search": ("Q{query}>", "{item}"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    longer = {"llama": {"max_position_embeddings": 1024}, "gpt2": {"n_positions": 1024}, "t5": {}}
    return {f: str(tiny_language_model(root / f, f, **longer[f])) for f in longer}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> str:
    """Templates of a few bytes, which is what a model of bytes can learn in seconds."""
    root = tmp_path_factory.mktemp("templates")
    for task, (prompt, response) in SHORT.items():
        wording = {"task": task, "templates": [{"prompt": prompt, "response": response}]}
        (root / f"{task}.yaml").write_text(yaml.safe_dump(wording))
    return str(root)


def make(source: str, mode: str = "full", **options: Any) -> Any:
    kind = "seq2seq" if Path(source).name == "t5" else "causal"
    section = {
        "name": f"pretrained_{kind}",
        "source": source,
        "max_history": 4,
        "prefix": "H",
        "dropout": 0.0,
        "tuning": {"mode": mode, "num_virtual_tokens": 3},
        **options,
    }
    return build_model(section, INDEX, seed=0)


def trainer_for(model: Any, **options: Any) -> tuple[InstructionTrainer, Any]:
    config = parse(InstructionTrainer.Config, {"name": "instructions", **options})
    trainer = InstructionTrainer(config, seed=0)
    trainer.start(model, INDEX, DATA.catalog)
    return trainer, trainer.examples(model, TRAINING)


class Log:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append(values)

    def summary(self, values: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


def fit(model: Any, trainer: Any, examples: Any, folder: Path) -> list[dict[str, float]]:
    log = Log()
    trainer.fit(
        model,
        examples,
        None,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        key="k",
        open_trackers=lambda step: log,
    )
    return log.lines


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_the_loss_is_that_of_a_plain_model_on_responses_only(family, folders):
    """Labels of prompts are not there at all: with them the plain model's loss is another one."""
    model = make(folders[family], "embeddings_only").eval()
    prompts = [[5, 9, 40, model.first_token + 1], [8], [6, 7, 30]]
    first = model.first_token
    responses = [[first, first + 5], [11, 12, 13, 1], [first + 2]]
    batch = collate_responses(prompts, responses, [0, 1, 1], model.kind)
    found = model(batch)
    plain = model.to_hugging_face()
    expected, with_prompts = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        read = torch.tensor([prompt if model.kind == "seq2seq" else [*prompt, *response]])
        labels = torch.tensor([response])
        if model.kind == "causal":
            labels = torch.tensor([[-100] * len(prompt) + response])
            with_prompts.append(float(plain(input_ids=read, labels=read).loss))
        loss = float(plain(input_ids=read, labels=labels).loss)
        expected.append(loss * len(response))
    torch.testing.assert_close(found.nll_B, torch.tensor(expected), atol=2e-4, rtol=1e-4)
    assert found.counts_B.tolist() == [2, 4, 1] and int(found.num_targets) == 7
    assert float(found.loss_sum) == pytest.approx(sum(expected), rel=1e-4)
    per = found.per_task(batch.tasks_B, 2, per="response")
    sums = [expected[0], expected[1] + expected[2], 2, 5, 1, 2]
    torch.testing.assert_close(per.figures, torch.tensor(sums), atol=5e-4, rtol=1e-4)
    assert float(per.loss) == pytest.approx(sum(expected) / 3, rel=1e-4)
    if with_prompts:
        assert abs(with_prompts[0] - expected[0] / 2) > 1e-2


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["prompt", "prefix"])
@torch.no_grad()
def test_virtual_tokens_shift_no_label(mode, family, folders):
    """What a response costs is what a search would pay for it, level by level."""
    model = make(folders[family], mode).eval()
    prompt, item = [5, 6, 7], INDEX.tokens()[9] + model.first_token
    found = model(collate_responses([prompt], [item.tolist()], [0], model.kind))
    hidden, state = model.read_tokens(torch.tensor([prompt]), torch.tensor([3]))
    total = 0.0
    for number, token in enumerate(item.tolist()):
        total -= float(model.vocabulary_scores(hidden).log_softmax(-1)[0, token])
        if number + 1 < len(item):
            hidden, state = model.extend_tokens(torch.tensor([token]), state, torch.tensor([0]))
    assert float(found.nll_B[0]) == pytest.approx(total, abs=1e-4)


def test_a_plain_example_is_what_next_item_training_and_search_read(folders):
    """The mixture's own sequential examples cost what the model's loss says they cost."""
    for family in ("llama", "t5"):
        model = make(folders[family], softmax="vocabulary").eval()
        mixture = {"tasks": {"sequential": 1.0}, "plain": 1.0}
        _, examples = trainer_for(model, mixture=mixture)
        model.eval()
        picks, batches = examples.plan(8, 0, 0)
        histories = [examples.mixture.example(picks.plan, int(n), 0, 0).text for n in batches[0]]
        if model.kind == "causal":
            same = pad_histories([(*t.prompt, *t.response) for t in histories], 5)
        else:
            targets = [t.response[0] for t in histories]
            same = pad_histories([t.prompt for t in histories], 4, targets=targets)
        with torch.no_grad():
            ours, theirs = model(examples.batch(picks, batches[0])), model(same)
        torch.testing.assert_close(ours.loss_sum, theirs.loss_sum, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora", "prompt", "prefix", "embeddings_only"])
def test_a_step_moves_what_the_mode_names_and_the_text_head_too(mode, folders, short):
    model = make(folders["llama"], mode)
    weights = dict.fromkeys(SHORT, 1.0)
    _, examples = trainer_for(model, mixture={"templates": short, "tasks": weights})
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert ("base.lm_head.weight" in learns) == (mode == "full")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    picks, batches = examples.plan(16, 0, 0)
    for batch in batches[:2]:
        optimizer.zero_grad()
        model.train()(examples.batch(picks, batch)).loss.backward()
        optimizer.step()
    moved = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert moved == learns


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_mixture_is_learned_by_heart_and_every_task_falls(family, folders, short, tmp_path):
    model = make(folders[family], init_noise=1.0)
    mixture = {
        "templates": short,
        "tasks": {"item_to_index": 1.0, "index_to_item": 1.0},
        "examples_per_epoch": 32,
        "augmentation": {"shuffle": "none", "mask": 0.0},
    }
    options = {
        "epochs": 50 if family == "t5" else 30,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "warmup": 0.1,
    }
    trainer, examples = trainer_for(model, mixture=mixture, **options)
    asker = Asker(model, DATA.catalog, trainer.config.mixture)
    constraint = CSRIndex.from_index(INDEX)
    titles = [str(title) for title in DATA.catalog.titles]
    asked = [asker.word("item_to_index", {"title": title}) for title in titles]

    def right() -> float:
        return float((asker.items(asked, constraint, k=1, width=8).rows[:, 0] == range(16)).mean())

    untrained = right()
    lines = fit(model, trainer, examples, tmp_path)
    for task in ("item_to_index", "index_to_item"):
        assert lines[0][f"task/{task}/share"] == 0.5
        assert lines[-1][f"task/{task}/loss"] < 0.5 * lines[0][f"task/{task}/loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    model.eval()
    assert right() > max(0.95, untrained)
    if family == "llama":
        texts = asker.texts([asker.word("index_to_item", {"item": row}) for row in range(16)])
        written = [best[0][0] for best in texts]
        assert np.mean([text == title for text, title in zip(written, titles, strict=True)]) > 0.9


def test_tasks_of_a_mixture_are_logged_and_accumulation_changes_nothing(folders, short, tmp_path):
    lines = {}
    for parts in (1, 4):
        model = make(folders["gpt2"])
        options = {"epochs": 2, "batch_size": 16, "accumulation": parts, "average": None}
        mixture = {"templates": short, "tasks": dict.fromkeys(SHORT, 1.0), "plain": 0.5}
        trainer, examples = trainer_for(
            model, mixture={**mixture, "examples_per_epoch": 48}, per="response", **options
        )
        lines[parts] = fit(model, trainer, examples, tmp_path / str(parts))
    names = {f"task/{task}/{what}" for task in SHORT for what in ("loss", "response_loss", "share")}
    for one, other in zip(lines[1], lines[4], strict=True):
        assert names <= set(one)
        for name in names | {"loss"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3)
        mean = sum(one[f"task/{t}/share"] * one[f"task/{t}/response_loss"] for t in SHORT)
        assert one["loss"] == pytest.approx(mean, rel=1e-5)
        assert sum(one[f"task/{t}/share"] for t in SHORT) == pytest.approx(1.0)


def test_batches_hold_every_example_once_and_are_the_same_again(folders, short):
    model = make(folders["t5"])
    mixture = {"templates": short, "tasks": dict.fromkeys(SHORT, 1.0)}
    _, examples = trainer_for(model, mixture=mixture)
    picks, batches = examples.plan(10, 0, 1)
    assert sorted(np.concatenate(batches).tolist()) == list(range(examples.mixture.size))
    again, same = examples.plan(10, 0, 1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, same, strict=True))
    one, two = examples.batch(picks, batches[0]), examples.batch(again, same[0])
    assert torch.equal(one.tokens_BT, two.tokens_BT) and torch.equal(one.labels_M, two.labels_M)
    assert len(one) == len(batches[0]) == len(one.to("cpu"))


def test_long_prompts_shrink_their_histories(folders):
    model = make(folders["gpt2"])
    mixture = {"tasks": {"titles_to_index": 1.0}, "max_tokens": 60}
    _, examples = trainer_for(model, mixture=mixture)
    picks, batches = examples.plan(64, 0, 0)
    lengths = []
    for batch in batches:
        for number in batch:
            _, encoded = examples.encoded(picks, int(number))
            lengths.append(len(encoded))
            assert encoded.response[-1] >= model.first_token
    assert max(lengths) <= 60 and min(lengths) < 58


def test_models_without_text_are_refused():
    section = {"name": "decoder_only", "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    model = build_model(section, INDEX, seed=0)
    trainer = InstructionTrainer(InstructionTrainer.Config(), seed=0)
    with pytest.raises(ConfigError, match=r"trainer\.name: got 'instructions' for a DecoderOnly"):
        trainer.start(model, INDEX, DATA.catalog)


# -- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("planted") / "data"
    DATA.save(path)
    return str(path)


def overrides(folder: str, data: str) -> list[str]:
    """What makes the ready configuration small."""
    changes = {
        "data": data,
        "features": {"name": "lsa", "num_dimensions": 8},
        "tokenizer": {"name": "rqkmeans", "num_levels": 2, "codebook_size": 4},
        "model.source": folder,
        "model.max_history": 3,
        "model.tuning.rank": 2,
        "trainer.epochs": 1,
        "trainer.batch_size": 12,
        "trainer.accumulation": 1,
        "trainer.validation_users": 4,
        "trainer.mixture.examples_per_epoch": 24,
        "trainer.mixture.max_tokens": 120,
        "evaluation": {"baselines": [], "bootstrap_samples": 100, "masked": [False]},
    }
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def ask(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["ask", *arguments, "--device", "cpu", "--json"])
    assert done.value.code == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_ready_configuration_runs_with_one_key_of_its_own(
    folders, planted_folder, root, tmp_path, capsys
):
    path = root / "configs" / "instructions" / "lc-rec.yaml"
    small = overrides(folders["llama"], planted_folder)
    config = load_run_config(path, small)
    out = tmp_path / "run"
    Run(config, out=out, cache=tmp_path / "cache", device="cpu").execute()
    lines = [json.loads(x) for x in (out / "seed-1" / "metrics.jsonl").read_text().splitlines()]
    tasks = {name.split("/")[1] for name in lines[0] if name.startswith("task/")}
    wanted = yaml.safe_load(path.read_text())["trainer"]["mixture"]["tasks"]
    assert tasks == {name for name, weight in wanted.items() if weight}
    assert 0 <= lines[0]["valid/ndcg@10"] <= 1
    recommender = Recommender.from_pretrained(out / "bundle", device="cpu")
    answer = recommender.recommend([["i1", "i2"]], k=3, exclude_seen=False)
    assert answer.item_ids.shape == (1, 3)
    steps = json.loads((out / "bundle" / "model" / "manifest.json").read_text())
    assert steps["extra"]["trainer"]["mixture"]["tasks"] == wanted
    bundle = str(out / "bundle")
    answers = [
        ask(capsys, bundle, "--query", "baban", "-k", "2"),
        ask(capsys, bundle, "--history", "i1,i2", "-k", "2"),
        ask(capsys, bundle, "--history", "i1", "--titles", "bm25"),
        ask(capsys, bundle, "--titles", "tree", "--data", planted_folder, "--shots", "1"),
    ]
    assert [len(answer["items"]) for answer in answers] == [2, 2, len(answers[2]["items"]), 10]
    assert len(answers[2]["written"]) == 5 and answers[0]["items"][0]["title"] in NAMES
    for wrong in ([], ["--query", "a", "--titles", "tree"], ["--titles", "tree", "--shots", "1"]):
        with pytest.raises(SystemExit) as caught:
            main(["ask", bundle, *wrong])
        assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_ready_configurations_are_valid(root):
    for path in (root / "configs" / "instructions").glob("*.yaml"):
        assert load_run_config(path).trainer.to_dict()["name"] == "instructions"
