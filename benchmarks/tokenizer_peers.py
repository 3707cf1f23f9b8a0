"""How are other libraries' tokenizers called, so that they can be compared on the same vectors?

None of them is a dependency: a library that is not installed is named, with the reason, in the
result. Every side is built with the same layers, codebooks, batch size, step size and epochs, and
is called as its own documentation or example does.

Shapes: N items, L levels, E embedding width.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True)
class Setting:
    """What all sides are given."""

    num_codes: int = 256
    num_levels: int = 3
    hidden: tuple[int, ...] = (512, 256, 128)
    latent: int = 32
    batch_size: int = 1024
    learning_rate: float = 1e-3
    epochs: int = 20
    iterations: int = 25


class Tokenized(NamedTuple):
    """What a side made of the vectors: codes (N, L) and vectors (N, E) decoded from them."""

    codes: np.ndarray
    decoded: np.ndarray


Fit = Callable[[np.ndarray, Setting], Tokenized]


def semantic_id_rqvae(vectors: np.ndarray, setting: Setting) -> Tokenized:
    """Fit semantic-id's RQ-VAE. Without `verbose` it returns the weights of the first epoch."""
    from semantic_id import RQVAE

    model = RQVAE(
        in_dim=vectors.shape[1],
        num_emb_list=[setting.num_codes] * setting.num_levels,
        e_dim=setting.latent,
        layers=list(setting.hidden),
        kmeans_init=True,
        lr=setting.learning_rate,
        batch_size=setting.batch_size,
        epochs=setting.epochs,
        verbose=10**6,
    )
    model.fit(vectors)
    codes = np.asarray(model.encode(vectors))
    return Tokenized(codes, np.asarray(model.decode(codes)))


def semantic_id_rqkmeans(vectors: np.ndarray, setting: Setting) -> Tokenized:
    """Fit semantic-id's residual k-means with one start (its default is ten)."""
    from semantic_id import RQKMeans

    model = RQKMeans(
        n_levels=setting.num_levels,
        n_clusters=setting.num_codes,
        random_state=0,
        n_init=1,
        max_iter=setting.iterations,
    )
    model.fit(vectors)
    codes = np.asarray(model.encode(vectors))
    return Tokenized(codes, np.asarray(model.decode(codes)))


def cornac_rqvae(vectors: np.ndarray, setting: Setting) -> Tokenized:
    """Fit the RQ-VAE inside cornac's TIGER."""
    model = _cornac(setting, "rqvae")
    inputs = torch.from_numpy(vectors)
    codes = model._tokenize(torch, inputs)
    with torch.no_grad():
        decoded = torch.cat([model.rqvae(part)[1] for part in inputs.split(4096)])
    return Tokenized(codes, decoded.numpy())


def cornac_rqkmeans(vectors: np.ndarray, setting: Setting) -> Tokenized:
    """Fit the residual k-means inside cornac's TIGER (iterations as it sets them)."""
    model = _cornac(setting, "rkmeans")
    codes = model._tokenize(torch, torch.from_numpy(vectors))
    books = model.rkmeans_centroids
    return Tokenized(codes, sum(book[codes[:, i]] for i, book in enumerate(books)))


def _cornac(setting: Setting, tokenizer: str) -> Any:
    from cornac.models.tiger.recom_tiger import TIGER

    model = TIGER(
        tokenizer=tokenizer,
        rqvae_latent_dim=setting.latent,
        rqvae_hidden_dims=setting.hidden,
        rqvae_num_levels=setting.num_levels,
        rqvae_codebook_size=setting.num_codes,
        rqvae_n_epochs=setting.epochs,
        rqvae_learning_rate=setting.learning_rate,
        rqvae_batch_size=setting.batch_size,
        verbose=False,
        seed=0,
    )
    model.device_ = "cpu"
    return model


def torch_rechub_rqvae(vectors: np.ndarray, setting: Setting) -> Tokenized:
    """Fit torch-rechub's RQ-VAE with its own trainer, as its example for Amazon Books does."""
    from torch.utils.data import DataLoader
    from torch_rechub.models.generative.rqvae import RQVAEModel
    from torch_rechub.trainers.rqvae_trainer import Trainer
    from torch_rechub.utils.data import EmbDataset

    model = RQVAEModel(
        in_dim=vectors.shape[1],
        num_emb_list=[setting.num_codes] * setting.num_levels,
        e_dim=setting.latent,
        layers=list(setting.hidden),
        kmeans_init=True,
        sk_epsilons=[0.0] * setting.num_levels,
    )
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "vectors.npy", vectors)
        data = EmbDataset(str(Path(folder) / "vectors.npy"))
        # drop_last: the k-means start asks for as many rows as codes of every batch.
        loader = DataLoader(data, setting.batch_size, shuffle=True, drop_last=True)
        trainer = Trainer(
            model,
            optimizer_params={"lr": setting.learning_rate, "weight_decay": 1e-5},
            n_epoch=setting.epochs,
            model_path=folder,
            eval_step=setting.epochs,
        )
        trainer.fit(loader)
    model.eval()
    parts = torch.from_numpy(vectors).split(4096)
    with torch.no_grad():
        codes = torch.cat([model.get_indices(part, use_sk=False) for part in parts])
        decoded = torch.cat([model(part, use_sk=False)[0] for part in parts])
    return Tokenized(codes.numpy(), decoded.numpy())


RQVAE_PEERS: dict[str, tuple[str, Fit]] = {
    "semantic-id": ("semantic_id", semantic_id_rqvae),
    "cornac": ("cornac", cornac_rqvae),
    "torch-rechub": ("torch_rechub", torch_rechub_rqvae),
}
RQKMEANS_PEERS: dict[str, tuple[str, Fit]] = {
    "semantic-id": ("semantic_id", semantic_id_rqkmeans),
    "cornac": ("cornac", cornac_rqkmeans),
}


def missing(module: str) -> str | None:
    """Return why a library cannot be used here, or None."""
    try:
        with quiet():
            importlib.import_module(module)
    except ImportError as error:
        return f"not installed here ({error})"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the peers print, log and draw out of the report."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
