"""What of a language model is tuned, and how are the tuned parts merged into it?

LoRA comes from peft, which is imported when a model needs it. Soft prompts and prefixes are a few
parameters of the backbone itself: they are a part of what all beams share, and peft's wrappers
around a model's `forward` and `generate` do not fit a search that keeps one copy of the prompt. It
refuses to know items and losses.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from genrec.config import StrictConfig
from genrec.errors import ConfigError, nearest

Mode = Literal["full", "lora", "prompt", "prefix", "embeddings_only", "frozen"]


class TuningConfig(StrictConfig):
    """Which weights train. The rows of the codes do in every mode but `frozen`."""

    mode: Mode = "lora"
    """full: all weights. lora: low-rank updates of the linear layers (Hu et al. 2022). prompt:
    vectors before the history (Lester et al. 2021). prefix: keys and values of every layer (Li &
    Liang 2021; P-Tuning v2, Liu et al. 2022). embeddings_only: nothing else (CLLM4Rec, Zhu et al.
    2024). frozen: nothing at all."""
    rank: int = Field(default=8, ge=1)
    """lora: rank of the updates."""
    alpha: int = Field(default=16, ge=1)
    """lora: updates are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """lora: dropout probability on the updates' input."""
    target_modules: tuple[str, ...] | None = None
    """lora: last names of the layers to update, such as q_proj; None: every linear layer of
    attention and feed-forward blocks, found by architecture, not the head."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """prompt, prefix: how many vectors."""


def linear_layers(model: Any) -> list[str]:
    """Return the names of all linear layers of a language model but its head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def add_lora(model: Any, config: TuningConfig) -> None:
    """Put LoRA on a model in place; its own weights stop training.

    Raises:
        ConfigError: target modules that the model has not.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = linear_layers(model)
    if config.target_modules is not None:
        known = sorted({name.rpartition(".")[2] for name in names})
        for wanted in config.target_modules:
            if wanted not in known:
                raise ConfigError(
                    f"model.tuning.target_modules: got {wanted!r}, expected names of linear layers "
                    f"of a {type(model).__name__}: {', '.join(known)}.{nearest(wanted, known)}"
                )
        names = [name for name in names if name.rpartition(".")[2] in config.target_modules]
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(lora, model)
    for name, weight in model.named_parameters():
        weight.requires_grad = "lora_" in name
        if weight.requires_grad:
            weight.data = weight.data.float()


def merge_lora(model: Any) -> None:
    """Add the updates to the weights and take the adapters off, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
