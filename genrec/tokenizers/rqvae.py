"""RQ-VAE: codes by residual quantization of a learned latent space (TIGER, Rajput et al. 2023).

The network and its training are in `rqvae_training.py`, the quantization in `quantization.py`; how
codes become unique is the business of `collisions.py`.

Shapes: N fitted items, M encoded items, L levels, K codes, D latent width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from genrec.runtime import choose_device
from genrec.tokenizers.base import (
    FloatArray,
    IntArray,
    ItemTokenizer,
    checked_vectors,
    not_fitted,
    require_distinct,
)
from genrec.tokenizers.quantization.codebook_size import CodebookConfig
from genrec.tokenizers.quantization.residual import code_distances
from genrec.tokenizers.quantization.rqvae_training import Network, Objective, train

if TYPE_CHECKING:
    from genrec.data import Catalog, Interactions

CHUNK = 16_384


class RQVAE(ItemTokenizer):
    """Autoencoder whose latent is a sum of one code vector per level.

    Args:
        config: see `RQVAE.Config`.
    """

    class Config(CodebookConfig):
        """Settings of the RQ-VAE."""

        name: Literal["rqvae"] = "rqvae"
        """Name in the registry."""
        num_levels: int = Field(default=3, ge=1)
        """Number of codes of an item, L (TIGER: 3)."""
        latent_dim: int = Field(default=32, ge=1)
        """Width D of the latent and of the code vectors (TIGER: 32)."""
        hidden_dims: tuple[int, ...] = (512, 256, 128)
        """Widths of the encoder's hidden layers; the decoder mirrors them (TIGER)."""
        normalize: bool = True
        """Scale vectors to length 1 first: the loss weights below assume that scale."""
        commitment: float = Field(default=0.25, ge=0)
        """Weight beta of the commitment loss (TIGER: 0.25)."""
        gradient: Literal["straight_through", "rotation"] = "straight_through"
        """How the reconstruction's gradient passes the quantization (TIGER: straight_through)."""
        residual_grad: Literal["detached_code", "ste"] = "detached_code"
        """What is subtracted from a residual. "ste" repeats LC-Rec and LETTER, whose commitment
        terms after the first level train nothing."""
        level_reduce: Literal["sum", "mean"] = "sum"
        """Codebook and commitment losses summed over levels (TIGER) or averaged (LC-Rec)."""
        last_level: Literal["nearest", "sinkhorn"] = "nearest"
        """How the last level assigns during training; "sinkhorn" spreads each batch evenly
        (LC-Rec). `encode` always takes the nearest code."""
        sinkhorn_epsilon: float = Field(default=0.003, gt=0)
        """Temperature of the Sinkhorn plan (LC-Rec: 0.003)."""
        sinkhorn_iterations: int = Field(default=50, ge=1)
        """Most normalisations of the Sinkhorn plan (LC-Rec: 50); fewer once it is balanced."""
        codebook_update: Literal["gradient", "ema"] = "gradient"
        """How code vectors follow their residuals: by the codebook loss's gradient (TIGER), or as
        moving averages (van den Oord et al. 2017), where that loss is only reported."""
        ema_decay: float = Field(default=0.95, ge=0, lt=1)
        """Decay per step of the moving averages (van den Oord et al.: 0.99, which lags behind the
        encoder in a training of a thousand steps)."""
        ema_smoothing: float = Field(default=1e-5, ge=0)
        """Laplace smoothing of the averaged counts, in items (Razavi et al. 2019: 1e-5)."""
        distance: Literal["l2", "cosine"] = "l2"
        """What the nearest code is: least squared distance (TIGER) or largest cosine. The whole
        code vector is subtracted with either."""
        contrastive_weight: float = Field(default=0.0, ge=0, le=1)
        """Weight w of contrastive reconstruction in (1 - w) squared error + w InfoNCE (TIGER: 0;
        CoST: 1, when only the direction of a decoded vector means something)."""
        contrastive_temperature: float = Field(default=0.1, gt=0)
        """Temperature of that InfoNCE between decoded and given vectors of a batch."""
        kmeans_init: bool = True
        """Start codebooks at k-means centroids of the residuals of all items (by mini-batches
        above 50,000 items)."""
        dead_code_every: int = Field(default=20, ge=0)
        """Steps between moves of unused codes onto random residuals; 0 never. Off in the last
        tenth of training, so that codes settle."""
        dead_code_share: float = Field(default=0.1, ge=0, le=1)
        """A code is unused when its share of the items falls below this part of 1 / K."""
        usage_decay: float = Field(default=0.95, ge=0, lt=1)
        """Decay per step of the running share of each code."""
        learning_rate: float = Field(default=1e-3, gt=0)
        """AdamW step size (TIGER: Adagrad 0.4; 1e-3 is the usual choice with AdamW)."""
        weight_decay: float = Field(default=1e-4, ge=0)
        """AdamW weight decay of the network (LETTER: 1e-4); codebooks have none."""
        batch_size: int = Field(default=256, ge=1)
        """Items per step, all batches of an epoch equal within one (TIGER: 1024)."""
        num_epochs: int = Field(default=200, ge=1)
        """Passes over the catalogue (TIGER: 20,000)."""
        seed: int = Field(default=0, ge=0)
        """Seed of weights, batches, first codes and moves of unused codes."""

    config: RQVAE.Config
    objective: ClassVar[type[Objective]] = Objective
    """What training minimises."""

    def __init__(self, config: RQVAE.Config) -> None:
        super().__init__(config)
        self._asked = config  # before `fit` chose the codebook size
        self._network: Network | None = None
        self.history: dict[str, list[float]] = {name: [] for name in self._loss_names()}
        """Loss and its unweighted parts per epoch (means over items), in order."""

    def fit(self, catalog: Catalog, interactions: Interactions | None = None) -> Self:
        """Train for `num_epochs` and keep the weights of the last step.

        The last, not the best, on purpose: the reconstruction falls until the end (moves of unused
        codes are off by then), and a fit that depends on one setting less is easier to repeat.
        Items are taken in the order of their ids, so the order of the catalogue does not matter.

        Raises:
            UserError: fewer different vectors than codes.
            TrainingError: the loss became NaN or infinite.
        """
        order = np.argsort(np.array(catalog.item_ids, dtype=str), kind="stable")
        self.config = self._asked.for_items(len(catalog))
        inputs = checked_vectors(catalog, normalize=self.config.normalize)[order]
        require_distinct(inputs, self.config.codebook_size)
        device = choose_device()
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.config.seed)
            network = Network(inputs.shape[1], self.config).to(device)
        objective = self._objective(network, catalog, interactions, order)
        self.history = train(network, torch.from_numpy(inputs).to(device), self.config, objective)
        self._network = network.cpu().eval().requires_grad_(False)
        return self

    def _objective(
        self,
        network: Network,
        catalog: Catalog,
        interactions: Interactions | None,
        order_N: IntArray,
    ) -> Objective:
        """Return what to minimise; `order_N` says which catalogue row each input came from."""
        return self.objective(network, self.config)

    def encode(self, catalog: Catalog) -> IntArray:
        """Return codes (M, L) int32: per level the code nearest to the residual."""
        network, inputs = self._fitted(), self.inputs(catalog)
        codes = np.empty((len(inputs), self.config.num_levels), np.int32)
        for part in _chunks(len(inputs)):
            codes[part] = network.quantize(torch.from_numpy(inputs[part])).codes_BL.numpy()
        return codes

    def decode(self, codes_ML: IntArray) -> FloatArray:
        """Return reconstructed vectors (M, E) float32, in the space of `inputs`."""
        network = self._fitted()
        vectors = np.empty((len(codes_ML), network.width), np.float32)
        for part in _chunks(len(codes_ML)):
            codes = torch.from_numpy(np.asarray(codes_ML[part], dtype=np.int64))
            vectors[part] = network.decode(codes).numpy()
        return vectors

    def inputs(self, catalog: Catalog) -> FloatArray:
        """Return the vectors (M, E) float32, scaled to length 1 if so configured."""
        width = self._network.width if self._network is not None else None
        return checked_vectors(catalog, normalize=self.config.normalize, width=width)

    def last_level_distances(self, catalog: Catalog) -> FloatArray:
        """Return squared distances (M, K) from the last latent residual to every last code.

        With the cosine distance 2 - 2 cos, the squared distance of the directions.
        """
        network, inputs = self._fitted(), self.inputs(catalog)
        distances = np.empty((len(inputs), self.config.codebook_size), np.float32)
        for part in _chunks(len(inputs)):
            residual = network.quantize(torch.from_numpy(inputs[part])).residuals_LBD[-1]
            distances[part] = code_distances(
                residual, network.codebooks[-1], distance=self.config.distance
            ).numpy()
        return np.maximum(distances, 0.0)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K for each of the L levels."""
        return (self.config.codebook_size,) * self.config.num_levels

    def state(self) -> dict[str, np.ndarray]:
        """Return the network's weights by name and the loss history (epochs, parts)."""
        weights = {name: t.numpy() for name, t in self._fitted().state_dict().items()}
        columns = [self.history[name] for name in self._loss_names()]
        return {**weights, "history": np.array(columns, np.float32).T.copy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take what `state` returned."""
        weights = {name: torch.tensor(a) for name, a in state.items() if name != "history"}
        network = Network(weights["encoder.0.weight"].shape[1], self.config)
        network.load_state_dict(weights)
        self._network = network.eval().requires_grad_(False)
        columns = np.asarray(state["history"]).T.tolist()
        self.history = dict(zip(self._loss_names(), columns, strict=True))
        return self

    def _loss_names(self) -> tuple[str, ...]:
        return self.objective.names(self.config)

    def _fitted(self) -> Network:
        if self._network is None:
            raise not_fitted(type(self).__name__)
        return self._network


def _chunks(num_items: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num_items, CHUNK))
