"""Weights in shards (FSDP2) train as whole ones, and the ready launcher files are valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from test_two_processes import LIMIT_S, environment, free_port

FILES = {
    "cpu": (DistributedType.NO, 1),
    "gpu": (DistributedType.NO, 1),
    "ddp-8gpu": (DistributedType.MULTI_GPU, 8),
    "fsdp": (DistributedType.FSDP, 8),
}

# accelerate turns FSDP on for accelerators only, so the test does on CPU what it does there.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from genrec.data.synthetic import ring
from genrec.decoding import CSRIndex
from genrec.item_index import ItemIndex
from genrec.models.decoder_only import DecoderOnly
from genrec.trainers.base import Trainer
from genrec.trainers.objectives import ObjectivesConfig
from genrec.trainers.validation import Validator
from genrec.weights import model_arrays

torch.set_num_threads(1)
out, sharded = Path(sys.argv[1]), sys.argv[2] == "sharded"
accelerator = Accelerator(cpu=True)
if sharded:
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
dataset = ring(num_items=12, num_users=20, length=8)
codes = np.array([(i // 4, i % 4) for i in range(12)])
index = ItemIndex(tuple(dataset.catalog.item_ids), codes, (3, 4))
vectors = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)


class Killed(BaseException):
    pass


class Mortal(Trainer):
    def compute_loss(self, model, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 6:
            raise Killed
        return super().compute_loss(model, batch)


def fit(cls, folder, seed=0):
    torch.manual_seed(seed)
    sizes = dict(max_history=4, d_model=15 + 1, num_layers=1, num_heads=2, d_ff=17, dropout=0.0)
    model = DecoderOnly.from_index(DecoderOnly.Config(**sizes), index)
    objectives = ObjectivesConfig(reconstruction=1.0)
    config = cls.Config(
        epochs=2, batch_size=8, accumulation=2, average=0.9, checkpoint_every=2,
        learning_rate=5e-3, objectives=objectives,
    )
    trainer = cls(config, seed=0)
    trainer.start(model, index, dataset.catalog.with_vectors(vectors))
    validator = Validator(
        dataset.interactions.examples("valid"), CSRIndex.from_index(index),
        num_users=10, width=12, seed=0,
    )
    examples = trainer.examples(model, dataset.interactions.training())
    result = trainer.fit(
        model, examples, validator, accelerator=accelerator, folder=folder, key="key"
    )
    return model, result


whole, result = fit(Trainer, out / "whole")
if sharded:
    try:
        fit(Mortal, out / "cut")
    except Killed:
        pass
    model, resumed = fit(Trainer, out / "cut", seed=9)
    assert resumed.resumed_from == 2, resumed.resumed_from
    one, two = model_arrays(whole), model_arrays(model)
    # Two uninterrupted runs in shards differ as much.
    assert all(np.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
if accelerator.is_main_process:
    losses = np.array([line["loss"] for line in result.curve])
    np.savez(out / "found.npz", losses=losses, **model_arrays(whole))
"""


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_accepts_its_file(name: str, root: Path) -> None:
    path = str(root / "configs" / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert isinstance(config, ClusterConfig)
    kind, processes = FILES[name]
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    assert config.mixed_precision == "no" and config.use_cpu == (name == "cpu")
    arguments = launch_command_parser().parse_args(["--config_file", path, "-m", "genrec", "run"])
    assert arguments.module and arguments.training_script == "genrec"
    if name == "fsdp":
        known = vars(arguments)
        assert config.fsdp_config["fsdp_version"] == 2
        assert set(config.fsdp_config) <= set(known)


def test_every_launcher_file_is_checked(root: Path) -> None:
    assert {p.stem for p in (root / "configs" / "accelerate").iterdir()} == set(FILES)


@pytest.mark.slow
def test_two_processes_with_shards_train_as_one_and_resume(tmp_path: Path, root: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    found = {}
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *address]
    for name, launcher in (("one", []), ("sharded", torchrun)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tmp_path / name), name],
            cwd=root,
            env=environment(ACCELERATE_USE_CPU="true", PYTHONPATH=str(root)),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(tmp_path / name / "found.npz") as arrays:
            found[name] = dict(arrays)
    for name, array in found["one"].items():
        np.testing.assert_allclose(found["sharded"][name], array, atol=2e-4, err_msg=name)
