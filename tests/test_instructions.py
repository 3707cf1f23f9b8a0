"""Are instructions worded as their templates say, drawn as their weights say, and free of held-out
data?"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import yaml

from genrec.config import parse
from genrec.data import Catalog
from genrec.data.interactions import TRAIN, Interactions
from genrec.data.prepare import PrepareConfig, prepare
from genrec.data.synthetic import planted, ring
from genrec.errors import ConfigError, UserError
from genrec.instructions.demonstrations import Demonstrations, few_shot
from genrec.instructions.encoding import PieceEncoder
from genrec.instructions.facts import ItemFacts
from genrec.instructions.mixture import Mixture, MixtureConfig, apportion, load_all
from genrec.instructions.tasks import TASKS, case_of
from genrec.instructions.templates import (
    SHIPPED,
    Augmentation,
    Record,
    Several,
    Slots,
    Template,
    TemplateConfig,
    load_templates,
)
from genrec.testing.language_models import tiny_tokenizer

DATA = planted(64, 30, 0)
TRAINING = DATA.interactions.training()
SLOTS = {name: task.slots for name, task in TASKS.items()}
STILL = Augmentation(shuffle="none", mask=0.0)
ANY = Slots(
    prompt=frozenset({"history", "attributes"}),
    response=frozenset({"item", "attributes"}),
    any_of=frozenset({"history"}),
    answer="item",
)
ALL = {name: load_all(MixtureConfig())[name] for name in TASKS}


def rated() -> Interactions:
    ratings = (1 + np.arange(len(DATA.interactions)) % 5).astype(np.float32)
    return replace(DATA.interactions, ratings=ratings)


def mixture(
    training: Interactions = TRAINING, catalog: Catalog = DATA.catalog, **options
) -> Mixture:
    return Mixture(parse(MixtureConfig, options), catalog, training, 6)


def template(prompt: str, response: str = "{item}", slots: Slots = ANY, **options) -> Template:
    config = parse(TemplateConfig, {"prompt": prompt, "response": response, **options})
    return Template(config, slots, path="t")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- templates -----------------------------------------------------------------------------------


def test_every_task_has_several_templates():
    files = {load_templates(path, SLOTS)[0]: path for path in SHIPPED.glob("*.yaml")}
    assert set(files) == set(TASKS)
    for task, path in files.items():
        wordings = yaml.safe_load(path.read_text())["templates"]
        assert len(wordings) >= 5 and len({w["prompt"] for w in wordings}) == len(wordings), task


@pytest.mark.parametrize(
    ("task", "number"), [(task, n) for task, made in ALL.items() for n in range(len(made))]
)
def test_every_template_round_trips(task, number):
    """What was put in is read out again by the literal text of the template."""
    made = ALL[task][number]
    values = {name: f"<<{name}>>" for name in made.placeholders}
    found = made.render(values, STILL, rng())
    text = {"prompt": "".join(found.prompt), "response": "".join(found.response)}
    assert not re.search(r"\{\w+\}", text["prompt"] + text["response"])
    for side, wording in (("prompt", made.config.prompt), ("response", made.config.response)):
        lines = "\n".join(f"{key}: {value}" for key, value in made.config.fields.items())
        whole = wording.replace("{fields}", lines)
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*?)", re.escape(whole))
        matched = re.fullmatch(pattern, text[side], flags=re.S)
        assert matched is not None
        assert matched.groupdict() == {name: values[name] for name in matched.groupdict()}
    assert set(re.findall(r"<<(\w+)>>", text["prompt"] + text["response"])) == made.placeholders


@pytest.mark.parametrize(
    ("wording", "message"),
    [
        ({"prompt": "{histroy}"}, r"t\.prompt: got the placeholder \{histroy\}.*'history'"),
        ({"prompt": "Next?"}, r"t\.prompt: got no placeholder that is always there.*\{history\}"),
        ({"prompt": "{history}", "response": "yes"}, r"expected \{item\} in it"),
        ({"prompt": "{history}", "response": "{item} {history}"}, r"t\.response: got the placeh"),
        ({"prompt": "{history"}, "which is no template"),
        ({"prompt": "{history!r}"}, r"got \{history!r\}, expected a bare name"),
        ({"prompt": "{}"}, r"got \{\}, expected a bare name"),
        ({"prompt": "{fields}"}, r"got the placeholder \{fields\}"),
        ({"prompt": "{history}", "fields": {"a": "b"}}, r"got `fields` but no \{fields\}"),
        (
            {"prompt": "{fields}", "fields": {"a": "{history}"}},
            "always there",
        ),
        (
            {"prompt": "{fields}", "fields": {"a": "{history}"}, "keep": ["b"]},
            r"t\.keep: got 'b', expected keys of `fields` \(a\)",
        ),
    ],
)
def test_bad_templates_are_refused_with_their_place(wording, message):
    with pytest.raises(ConfigError, match=message):
        template(**wording)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: sequential\ntemplates: [{prompt: 'a {history}'}]", r"0\.response: missing"),
        ("task: sequential\ntemplates: []", "at least 1 item"),
        ("templates: [{prompt: a, response: b}]", "task: missing"),
        ("task: serial\ntemplates: [{prompt: a, response: b}]", r"'serial'.*Did you mean"),
        ("task: sequential\ntemplates: [{promt: a, response: b}]", r"promt: unknown key.*'prompt'"),
        ("task: sequential\ntemplates: [{prompt: a, response: '{item}'}]", r"\.0\.prompt"),
    ],
)
def test_bad_files_of_templates_are_refused_by_name(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"templates mine\.yaml: ") as caught:
        load_templates(path, SLOTS)
    assert re.search(message, str(caught.value))


def test_a_users_templates_replace_those_of_their_task(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a folder with YAML files"):
        mixture(templates=str(tmp_path))
    wording = {"task": "index_to_item", "templates": [{"prompt": "#{item}", "response": "{title}"}]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(wording))
    config = MixtureConfig(templates=str(tmp_path), tasks={"index_to_item": 1.0})
    made = mixture(templates=str(tmp_path), tasks={"index_to_item": 1.0})
    found = made.example(made.plan(0, 0), 0, 0, 0).text
    assert found.prompt[0] == "#" and len(found.prompt) == 2
    one = config.reads(DATA.catalog)
    assert one != MixtureConfig().reads(DATA.catalog)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(wording).replace("#", "No. "))
    assert config.reads(DATA.catalog) != one


# -- shuffling and masking -----------------------------------------------------------------------

PAIRS = Record(tuple((f"k{n}", str(n)) for n in range(6)))


def test_keys_are_shuffled_and_masked_in_prompts_and_only_shuffled_in_responses():
    made = template("{history}\n{attributes}", "{attributes} {item}")
    values = {"history": 3, "attributes": PAIRS, "item": 4}
    drawn = Augmentation(shuffle="both", mask=0.5)
    prompts, answers = set(), set()
    for seed in range(60):
        found = made.render(values, drawn, rng(seed))
        assert found == made.render(values, drawn, rng(seed))
        prompts.add(found.prompt[1])
        answers.add(found.response[0])
    sizes = [len(text.strip().splitlines()) for text in prompts]
    assert min(sizes) >= 1 and max(sizes) <= 6 and len(set(sizes)) > 3
    whole = [f"k{n}: {n}" for n in range(6)]
    assert all(sorted(text.strip().splitlines()) == whole for text in answers)
    assert len(answers) > 50
    plain = made.render(values, STILL, rng(1))
    assert plain.prompt == (3, "\n" + "\n".join(f"k{n}: {n}" for n in range(6)))
    for side in ("prompt", "response"):
        only = Augmentation(shuffle=side, mask=0.0)
        texts = {made.render(values, only, rng(seed)) for seed in range(9)}
        moved = {len({t.prompt for t in texts}) > 1, len({t.response for t in texts}) > 1}
        assert moved == {True, False}
        assert (len({t.prompt for t in texts}) > 1) == (side == "prompt")


def test_fields_move_and_vanish_but_for_those_to_keep():
    made = template(
        "{fields}", fields={"seen": "{history}", "about": "{attributes}"}, keep=["seen"]
    )
    drawn = Augmentation(mask=0.4)
    values = {"history": 7, "attributes": Record((("k", "v"),)), "item": 1}
    found = [made.render(values, drawn, rng(seed)).prompt for seed in range(80)]
    assert all(7 in pieces for pieces in found)
    assert set(found) == {
        ("seen: ", 7),
        ("seen: ", 7, "\nabout: k: v"),
        ("about: k: v\nseen: ", 7),
    }


def test_candidates_are_shuffled_and_histories_are_not():
    made = mixture(tasks={"choice": 1.0}, num_candidates=5)
    firsts = []
    for number in range(40):
        case_epochs = [made.example(made.plan(0, e), number, 0, e) for e in (0, 1)]
        for found in case_epochs:
            items = [piece for piece in found.text.prompt if isinstance(piece, int)]
            target = found.text.response[0]
            assert items.count(target) >= 1
            firsts.append(items[0])
    assert len(set(firsts)) > 5
    ordered = template("{history}")
    values = {"history": Several((1, 2, 3, 4)), "item": 5}
    drawn = {ordered.render(values, Augmentation(), rng(seed)).prompt for seed in range(9)}
    assert drawn == {(1, 2, 3, 4)}


# -- tasks ---------------------------------------------------------------------------------------


def test_facts_come_from_the_catalogue():
    table = pl.DataFrame(
        {
            "item_id": ["a", "b", "c"],
            "title": ["Heat", None, "Up  again"],
            "genre": [["Crime", "Drama"], ["Drama"], []],
            "plot": ["word " * 40, "", None],
            "wish": ["a heist", None, "a balloon"],
        }
    )
    facts = ItemFacts(Catalog(table), max_characters=21, query_column="wish")
    assert facts.titles == ["Heat", "", "Up again"]
    assert facts.records[0].pairs == (("genre", "Crime, Drama"), ("plot", "word word word word"))
    assert facts.labels(0) == [("genre", "Crime"), ("genre", "Drama")]
    assert [facts.query(row, rng()) for row in (0, 2)] == ["a heist", "a balloon"]
    assert [facts.has_query(row) for row in range(3)] == [True, False, True]
    summary = facts.summary([0, 1, 2])
    assert summary is not None and summary.pairs == (("genre", "Drama, Crime"),)
    assert facts.summary([2]) is None and facts.named([1]) is None
    own = ItemFacts(Catalog(table))
    assert {own.query(1, rng(seed)) for seed in range(5)} == {"Drama"}
    drawn = {own.query(0, rng(seed)) for seed in range(40)}
    assert {"Crime", "Drama"} < drawn and max(text.count(",") for text in drawn) == 2
    with pytest.raises(ConfigError, match=r"query_column: got 'wsh'.*Did you mean 'wish'"):
        ItemFacts(Catalog(table), query_column="wsh")


@pytest.mark.parametrize("task", list(TASKS))
def test_examples_of_a_task_say_what_the_data_says(task):
    training = replace(TRAINING, ratings=rated().training().ratings)
    made = mixture(training, tasks={task: 1.0}, plain=0.0, augmentation={"mask": 0.0})
    plan = made.plan(3, 1)
    for number in range(0, len(plan), 7):
        case = case_of(made.sources, TASKS[task], int(plan.places[number]), 6)
        found = made.example(plan, number, 3, 1)
        text = "".join(p for p in found.text.prompt if isinstance(p, str))
        answer = found.text.response
        title = DATA.catalog.titles[case.target]
        if TASKS[task].slots.answer == "item":
            assert answer == (case.target,)
        elif TASKS[task].slots.answer == "title":
            assert str(title) in "".join(str(piece) for piece in answer)
        elif task == "rating":
            assert answer == (f" {case.rating:g}",)
        else:
            assert "category: " in answer[0]
        asked = [p for p in found.text.prompt if isinstance(p, int)]
        known = set(case.history.tolist())
        if task == "index_to_item":
            assert asked == [case.target]
        elif task == "item_to_index":
            assert not asked and (str(title) in text or "category" in text)
        elif task not in ("choice", "rating", "preference"):
            assert set(asked) <= known
        if task == "item_search":
            labels = [value for _, value in made.sources.facts.labels(case.target)]
            assert any(label in text for label in labels)


def test_a_long_history_keeps_its_last_items():
    made = mixture(tasks={"sequential": 1.0}, plain=1.0)
    plan = made.plan(0, 0)
    for number in range(len(plan)):
        place = int(plan.places[number])
        user = int(TRAINING.user_rows[place])
        before = TRAINING.item_rows[TRAINING.offsets[user] : place][-6:]
        found = made.example(plan, number, 0, 0)
        assert found.plain and found.text.prompt == tuple(before.tolist())
        assert made.history_lengths(plan)[number] == len(before)
        short = made.example(plan, number, 0, 0, max_history=2)
        assert short.text.prompt == found.text.prompt[-2:]


def test_no_held_out_interaction_enters():
    """Other held-out items give the same examples, down to the last piece."""
    events = DATA.interactions
    others = (events.item_rows + 17) % 64
    rows = np.where(events.splits == TRAIN, events.item_rows, others)
    changed = replace(events, item_rows=rows.astype(np.int32))
    assert not np.array_equal(changed.item_rows, events.item_rows)
    weights = dict.fromkeys((n for n in TASKS if n != "rating"), 1.0)
    one, two = (mixture(e.training(), tasks=weights) for e in (events, changed))
    for epoch in range(2):
        plan = one.plan(0, epoch)
        same = [
            one.example(plan, n, 0, epoch) == two.example(two.plan(0, epoch), n, 0, epoch)
            for n in range(len(plan))
        ]
        assert all(same) and len(same) == one.size


# -- mixing --------------------------------------------------------------------------------------


def test_weights_are_shares_and_nothing_repeats_before_its_turn():
    made = mixture(
        tasks={"sequential": 3.0, "index_to_item": 1.0, "preference": 0.0}, examples_per_epoch=200
    )
    assert made.tasks == ("sequential", "index_to_item")
    for epoch in range(3):
        plan = made.plan(5, epoch)
        assert np.bincount(plan.tasks).tolist() == [150, 50]
        assert len(set(plan.places[plan.tasks == 1].tolist())) == 50  # of 64 items
    assert not np.array_equal(made.plan(5, 0).places, made.plan(5, 1).places)
    many = mixture(tasks={"index_to_item": 1.0}, examples_per_epoch=150).plan(0, 0)
    assert set(np.bincount(many.places).tolist()) == {2, 3}
    assert apportion(np.array([1.0, 1.0, 1.0]), 2).tolist() == [1, 1, 0]


def test_plain_is_a_share_of_the_sequential_examples():
    made = mixture(tasks={"sequential": 1.0}, plain=0.25, examples_per_epoch=400)
    plan = made.plan(0, 0)
    plain = sum(made.example(plan, n, 0, 0).plain for n in range(400))
    assert 70 < plain < 130
    worded = mixture(tasks={"sequential": 1.0}, plain=0.0)
    assert not any(worded.example(worded.plan(0, 0), n, 0, 0).plain for n in range(50))


def test_examples_are_a_function_of_seed_epoch_and_place():
    one, two = mixture(), mixture()
    plan = one.plan(1, 2)
    backwards = [two.example(two.plan(1, 2), n, 1, 2) for n in range(79, -1, -1)][::-1]
    assert backwards == [one.example(plan, n, 1, 2) for n in range(80)]
    other = [one.example(plan, n, 1, 3) for n in range(80)]
    assert backwards != other


def test_tasks_without_data_are_left_out_or_refused():
    bare = ring(12, 12, 6)
    made = mixture(bare.interactions.training(), bare.catalog)
    assert "preference" not in made.tasks and "item_search" not in made.tasks
    assert "item_to_index" in made.tasks
    for task, needs in (("preference", "attributes of items"), ("rating", "ratings")):
        with pytest.raises(ConfigError, match=rf"tasks\.{task}: got a weight.*it needs {needs}"):
            mixture(bare.interactions.training(), bare.catalog, tasks={task: 1.0})
    untitled = Catalog(bare.catalog.table.select("item_id"))
    assert mixture(bare.interactions.training(), untitled).tasks == ("sequential",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {"sequentail": 1.0}}, r"unknown task. Did you mean 'sequential'"),
        ({"tasks": {"sequential": -1.0}}, "expected a number >= 0"),
        ({"tasks": {"sequential": 0.0}}, "weight above 0"),
        ({"plain": 1.5}, "plain: got 1.5"),
        ({"augmentation": {"mask": 1.0}}, r"augmentation\.mask: got 1\.0"),
        ({"augmentation": {"shuffle": "all"}}, r"augmentation\.shuffle: got 'all'"),
        ({"taks": {}}, r"taks: unknown key\. Did you mean 'tasks'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(MixtureConfig, options)


# -- ratings in the data -------------------------------------------------------------------------


def test_ratings_are_kept_where_asked_for(tmp_path):
    lines = ["user_id,item_id,rating,timestamp"]
    lines += [f"u{n},i{(n + k) % 5},{1 + (n + k) % 3},{k}" for n in range(5) for k in range(4)]
    path = tmp_path / "events.csv"
    path.write_text("\n".join(lines))
    source = {"name": "tabular", "path": str(path)}
    least = {"min_user_interactions": 1, "min_item_interactions": 1}
    kept = prepare(source, PrepareConfig(keep_ratings=True, **least), tmp_path / "kept")
    plain = prepare(source, PrepareConfig(**least), tmp_path / "plain")
    again = type(kept).load(tmp_path / "kept").interactions
    assert plain.interactions.ratings is None and kept.info["ratings"] == "kept"
    assert again.ratings is not None and again.fingerprint == kept.interactions.fingerprint
    assert again.fingerprint != plain.interactions.fingerprint
    ids = kept.catalog.item_ids
    for user in range(5):
        first = int(again.offsets[user])
        expected = [1 + (user + k) % 3 for k in range(4)]
        assert [ids[r] for r in again.user(user)] == [f"i{(user + k) % 5}" for k in range(4)]
        assert again.ratings[first : first + 4].tolist() == expected
    training = again.training()
    assert training.ratings is not None and len(training.ratings) == len(training)
    strict = PrepareConfig(keep_ratings=True, rating_threshold=2, **least)
    some = prepare(source, strict).interactions.ratings
    assert some is not None and set(some.tolist()) == {2.0, 3.0}


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gemma2", "bart"])
def test_codes_stay_whole_whatever_stands_beside_them(family):
    """The same tokens as the extended tokenizer reads where the codes are written out."""
    from genrec.models.language_models import frame_tokens
    from genrec.models.vocabulary import CodeVocabulary

    tokenizer = tiny_tokenizer(family)
    vocabulary = CodeVocabulary(len(tokenizer), (4, 4))
    extended = vocabulary.extend(tokenizer)
    tokens_NL = np.array([[n // 4, 4 + n % 4] for n in range(16)]) + len(tokenizer)
    before, after = frame_tokens(tokenizer, "")
    encoder = PieceEncoder(tokenizer, tokens_NL, before, after, ends=True, max_tokens=400)
    names = vocabulary.names
    for made in (m for templates in ALL.values() for m in templates):
        values = {n: Several((3, 14)) for n in made.placeholders}
        found = made.render(values, STILL, rng())
        encoded = encoder.encode(found)
        for side, pieces in ((encoded.prompt, found.prompt), (encoded.response, found.response)):
            codes = [token for token in side if token >= len(tokenizer)]
            items = [piece for piece in pieces if isinstance(piece, int)]
            assert codes == tokens_NL[items].reshape(-1).tolist()
            written = "".join(
                p if isinstance(p, str) else names[p // 4] + names[4 + p % 4] for p in pieces
            )
            read = extended(written, add_special_tokens=False)["input_ids"]
            assert [token for token in read if token >= len(tokenizer)] == codes
        assert encoded.prompt[: len(before)] == before
        assert not after or encoded.prompt[-len(after) :] == after


def test_what_is_too_long_loses_its_beginning_and_texts_end():
    tokenizer = tiny_tokenizer("gpt2")
    encoder = PieceEncoder(tokenizer, np.array([[900, 901]]), [7], [], ends=False, max_tokens=20)
    made = template("{history} and much more text than fits", "{item}")
    found = made.render({"history": 0, "item": 0}, STILL, rng())
    encoded = encoder.encode(found)
    assert len(encoded) == 20 and encoded.response == [900, 901] and not encoder.fits(found)
    assert encoded.prompt == [7, *encoder.text("and much more text than fits")[-17:]]
    end = tokenizer.eos_token_id
    assert encoder.encode(replace(found, response=("long " * 9,))).response[-1] == end
    assert len(encoder.encode(replace(found, response=("long " * 9,))).response) == 10
    tokenizer.eos_token = None
    broken = PieceEncoder(tokenizer, np.array([[900]]), [], [], ends=False, max_tokens=20)
    assert broken.end == list(encoder.text("\n"))
    unable = tiny_tokenizer("t5")
    unable.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        PieceEncoder(unable, np.array([[900]]), [], [], ends=True, max_tokens=20)


# -- demonstrations ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["overlap", "vectors"])
def test_demonstrations_are_training_users_like_the_history(by):
    vectors = DATA.catalog.vectors
    found_by = Demonstrations(TRAINING, by=by, vectors=vectors, max_history=4)
    test = DATA.interactions.examples("test")
    histories = [test.history(n) for n in range(10)]
    answers = found_by.find(histories, 3)
    for history, user, shown in zip(histories, test.user_rows[:10], answers, strict=True):
        assert len(shown) == 3
        for demonstration in shown:
            sequence = TRAINING.user(demonstration.user_row)
            assert demonstration.target == sequence[-1]
            assert list(demonstration.history) == sequence[:-1][-4:].tolist()
            assert demonstration.user_row != user  # its training items stand in its own history
        best = set(TRAINING.user(shown[-1].user_row)) & set(history)
        assert best or by == "vectors"
    if by == "overlap":
        target = TRAINING.user(4)[:-1]
        nearest = found_by.find([target], 1)[0][0]
        assert nearest.user_row == 4  # not the whole sequence: somebody who did the same


def test_demonstrations_of_held_out_users_are_refused():
    with pytest.raises(UserError, match=r"Pass interactions\.training\(\)"):
        Demonstrations(DATA.interactions)
    with pytest.raises(UserError, match="got none item vectors, expected one for each of 64"):
        Demonstrations(TRAINING, by="vectors")
    lonely = Interactions(
        np.zeros(2, np.int32), np.array([0, 1, 2]), np.zeros(2, np.int64), np.zeros(2, np.uint8), 3
    )
    with pytest.raises(UserError, match="no user with two"):
        Demonstrations(lonely)
    assert few_shot([("a", 1)], ("b", 2)) == ("a", 1, "\n\nb", 2)
