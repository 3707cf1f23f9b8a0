"""The index on disk: mapped, equal, damage found; and the layout that other servers read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from genrec.decoding import CSRIndex, Filters, beam_search
from genrec.decoding.export import export_constraint
from genrec.decoding.hf import prefix_allowed_tokens_fn
from genrec.errors import ArtifactError, UserError
from genrec.item_index import ItemIndex
from genrec.testing import ConstraintIndexContract, TableModel, random_index
from genrec.testing.decoding import random_titles


class TestLoadedIndex(ConstraintIndexContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        self.path = tmp_path

    def make(self, index):
        path = self.path / str(len(list(self.path.iterdir())))
        CSRIndex.from_index(index).save(path)
        return CSRIndex.load(path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["dense and sparse levels", "titles"])
def test_loaded_equals_saved(tmp_path, kind, verify):
    index = random_titles(300, 9, 4) if kind == "titles" else random_index(2000, (16, 16, 256))
    built = CSRIndex.from_index(index)
    built.save(tmp_path / "index", upstream={"index": index.fingerprint})
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["upstream"] == {"index": index.fingerprint}
    loaded = CSRIndex.load(tmp_path / "index", verify=verify)
    names = ("codebook_sizes", "num_nodes", "num_shared", "num_running", "num_bytes")
    for name in names:
        assert getattr(loaded, name) == getattr(built, name)
    assert torch.equal(loaded.rows_N, built.rows_N)
    for got, expected in zip(loaded.levels, built.levels, strict=True):
        assert (got.max_degree, got.num_codes) == (expected.max_degree, expected.num_codes)
        for a, b in zip(got.tensors, expected.tensors, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    model = TableModel(index.codebook_sizes)
    filters = Filters(exclude=[[1, 2], [3]])
    beams = [
        beam_search(model, torch.arange(2), one, width=9, k=9, filters=filters, scoring="level")
        for one in (built, loaded)
    ]
    assert torch.equal(beams[0].rows_Bk, beams[1].rows_Bk)


def mapped_ranges(name):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = [line.split() for line in maps if line.rstrip().endswith(name)]
    return [tuple(int(x, 16) for x in line[0].split("-")) for line in lines]


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    path = tmp_path / "index"
    CSRIndex.from_index(random_index(3000, (16, 300, 256))).save(path)
    loaded = CSRIndex.load(path)
    try:
        ranges = mapped_ranges(str(path / "arrays.safetensors"))
    except OSError:
        pytest.skip("needs /proc/self/maps")
    for tensor in [loaded.rows_N, *(t for level in loaded.levels for t in level.tensors)]:
        place = tensor.data_ptr()
        assert any(start <= place < stop for start, stop in ranges)


def test_damage_is_found(tmp_path):
    path = tmp_path / "index"
    CSRIndex.from_index(random_index(100, (8, 8, 8))).save(path)
    file = path / "arrays.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"arrays.safetensors' is damaged.*checksum differs"):
        CSRIndex.load(path)
    file.write_bytes(whole[:-40])
    for verify in (True, False):
        with pytest.raises(ArtifactError, match=r"damaged.*expected \d+ bytes"):
            CSRIndex.load(path, verify=verify)
    file.write_bytes(b"x" * len(whole))
    with pytest.raises(ArtifactError, match="damaged"):
        CSRIndex.load(path, verify=False)
    file.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        CSRIndex.load(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        CSRIndex.load(tmp_path / "nowhere")


def test_other_artifacts_and_restricted_views_are_refused(tmp_path):
    index = random_index(10, (4, 4))
    index.save(tmp_path / "items")
    with pytest.raises(ArtifactError, match=r"'index' artifact, expected 'constraint'"):
        CSRIndex.load(tmp_path / "items")
    view = CSRIndex.from_index(index).restricted(np.arange(10) > 3)
    with pytest.raises(UserError, match=r"a rule restricts.*restricted\(\) after loading"):
        view.save(tmp_path / "view")
    assert not (tmp_path / "view").exists()


# The layout for other servers. The reader needs JSON, safetensors and numpy: no genrec, no torch.


class Reader:
    def __init__(self, folder):
        self.facts = json.loads((folder / "manifest.json").read_text())["extra"]
        self.arrays = load_file(folder / "arrays.safetensors")

    def children(self, node, level):
        start, stop = self.arrays[f"level.{level}.pointers"][node : node + 2]
        return start, self.arrays[f"level.{level}.tokens"][start:stop]

    def walk(self, tokens):
        node = 0
        for level, token in enumerate(tokens):
            start, found = self.children(node, level)
            place = np.searchsorted(found, token)
            if place == len(found) or found[place] != token:
                return None
            node = start + place
        return node

    def allowed(self, tokens):
        return self.children(self.walk(tokens), len(tokens))[1].tolist()

    def item_id(self, tokens):
        row = self.arrays["rows"][self.walk(tokens)]
        start, stop = self.arrays["item_ids.offsets"][row : row + 2]
        return self.arrays["item_ids.bytes"][start:stop].tobytes().decode()


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.integers(1, 60), st.integers(0, 99))
def test_a_reader_without_genrec_finds_the_same_tokens_and_items(
    tmp_path_factory, titles, count, seed
):
    index = random_titles(count, 4, 3, seed) if titles else random_index(count, (4, 300, 3), seed)
    ids = tuple(f"größe {i}" for i in range(len(index)))
    index = ItemIndex(ids, index.codes, index.codebook_sizes, index.shared_vocabulary)
    folder = tmp_path_factory.mktemp("export") / "catalogue"
    export_constraint(folder, index, first_token=7)
    reader = Reader(folder)
    allowed = prefix_allowed_tokens_fn(index, first_token=7, prompt_length=0)
    for item, tokens in zip(index.item_ids, index.tokens(7).tolist(), strict=True):
        for length in range(index.num_levels):
            prefix = tokens[:length]
            assert reader.allowed(prefix) == allowed(0, torch.tensor(prefix, dtype=torch.int64))
        assert reader.item_id(tokens) == item
    assert reader.walk([7 + 10_000]) is None
    facts = reader.facts
    assert facts["num_items"] == len(index) and facts["layout_version"] == 1
    assert facts["level_offsets"] == index.level_offsets.tolist()
    assert facts["end_token"] == (7 if titles else None)
