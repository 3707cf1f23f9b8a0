"""What can every trainer be told? Options of the loop, whatever is learned by it.

What a trainer learns adds options of its own in its nested `Config`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genrec.config import StrictConfig
from genrec.data import Catalog


class LoopConfig(StrictConfig):
    """Options of the training loop."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training data at most."""
    batch_size: int = Field(default=64, ge=1)
    """Examples of one optimizer step, over all processes: users' stretches for causal
    backbones, (history, target) pairs for encoder-decoders."""
    batch_targets: int | None = Field(default=None, ge=1)
    """Instead of `batch_size`: as many examples as hold so many targets on average, which suits
    data sets of long and of short histories alike."""
    min_steps: int = Field(default=1750, ge=0)
    """With `batch_targets`: halve it until all epochs hold so many optimizer steps, so that small
    data sets are not left untrained. 0: never."""
    accumulation: int = Field(default=1, ge=1)
    """Parts that a batch is computed in, one after the other, to save memory."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay of matrices (not of norms and biases)."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps with linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up; cosine falls to a tenth of the peak."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient of the mean loss."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, e.g. 0.999; the average is what is
    validated and kept. None: the weights themselves."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of matrix products; weights stay fp32."""
    gradient_checkpointing: bool = False
    """Compute activations of the layers twice to save memory (Chen et al. 2016); the same
    gradients."""
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """Backend of torch.compile for the loss; None: not compiled. inductor needs a C++ compiler on
    CPU and Triton on a GPU; the others find out whether a model can be compiled."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations."""
    patience: int = Field(default=5, ge=1)
    """Validations without a better NDCG@10 after which training stops."""
    validation_users: int = Field(default=1000, ge=1)
    """Users of the fixed validation sample."""
    validation_width: int = Field(default=20, ge=1)
    """Beam width of validation."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimizer steps between checkpoints beside the one after each epoch; 0 = only those."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Newest checkpoints kept while training."""

    def reads(self, catalog: Catalog) -> dict[str, str]:
        """Return digests of what else decides the outcome, for keys of results."""
        return {}
