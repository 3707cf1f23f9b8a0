"""Which weights of a backbone on a language model train, and what are its virtual tokens?

A mode of tuning is a choice of which parameters train. The modes `prompt` and `prefix` add some: a
soft prompt before what is read, or keys and values that every layer starts from. It refuses to know
how tokens become vectors and scores (`genrec.models.pretrained_tokens`), how low-rank updates are
made (`genrec.models.adapters`) and what a search does with a cache.

Shapes: B requests, T tokens, P virtual tokens, h heads, d width of a head, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from genrec.errors import ConfigError
from genrec.models import adapters
from genrec.models.pretrained_tokens import PretrainedTokens


class PretrainedTuning(PretrainedTokens):
    """The part of `PretrainedBackbone` that knows `model.tuning`."""

    _forgets = False
    virtual_PD: nn.Parameter
    virtual_keys: nn.ParameterList
    virtual_values: nn.ParameterList

    def _tune(self) -> None:
        """Let train what the mode says, and add what it adds."""
        tuning = self.config.tuning
        for weight in self.base.parameters():
            if weight.is_floating_point():
                weight.requires_grad = tuning.mode == "full"
        if tuning.mode == "full" and not self.tied and self.config.softmax != "vocabulary":
            self._head.weight.requires_grad = False  # nothing is ever scored by it
        if tuning.mode == "lora":
            adapters.add_lora(self.base, tuning)
        elif tuning.mode == "prompt":
            self.virtual_PD = nn.Parameter(self._virtual_tokens().float())
        elif tuning.mode == "prefix":
            keys, values = self._virtual_keys_values()
            self.virtual_keys, self.virtual_values = (
                nn.ParameterList(keys),
                nn.ParameterList(values),
            )
        elif tuning.mode == "frozen":
            self.requires_grad_(False)

    def train_text_head(self) -> None:
        """Let an untied head train too where everything does: responses may be text."""
        if self.config.tuning.mode == "full":
            self._head.weight.requires_grad = True

    def base_names(self) -> set[str]:
        """Return names of the state's entries that are as the base came: they are not saved."""
        if self.config.tuning.mode == "full":
            return set()
        return {
            name for name in self.state_dict() if name.startswith("base.") and "lora_" not in name
        }

    @torch.no_grad()
    def _virtual_tokens(self) -> Tensor:
        """Return the embeddings of P tokens of the base, drawn at random (Lester et al. 2021)."""
        count = self.config.tuning.num_virtual_tokens
        return self.embed(torch.randint(0, self.first_token, (count,)).to(self.device))

    @torch.no_grad()
    def _virtual_keys_values(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the base makes of P of its tokens, per layer (h, P, d)."""
        layers: Any = self._read_virtual(self._virtual_tokens().unsqueeze(0)).layers
        return (
            [layer.keys[0].float().clone() for layer in layers],
            [layer.values[0].float().clone() for layer in layers],
        )

    @abstractmethod
    def _read_virtual(self, vectors_1PD: Tensor) -> DynamicCache:
        """Return the keys and values of the layers that write the codes."""

    def virtual_cache(self, num_rows: int) -> DynamicCache | None:
        """Return a cache that holds the prefix for so many rows; None without a prefix."""
        if self.config.tuning.mode != "prefix":
            return None
        cache = DynamicCache()
        dtype = self.base.dtype
        for number, (keys, values) in enumerate(
            zip(self.virtual_keys, self.virtual_values, strict=True)
        ):
            shape = (num_rows, *keys.shape)
            cache.update(keys.to(dtype).expand(shape), values.to(dtype).expand(shape), number)
        return cache

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Let the base's layers forget their activations; see `Backbone.checkpoint_gradients`."""
        if not enabled:
            if self._forgets:
                self.base.gradient_checkpointing_disable()
        elif self.config.tuning.mode == "prefix":
            raise ConfigError(
                "trainer.gradient_checkpointing: got true with model.tuning.mode=prefix, expected "
                "false: the prefix lies in the cache, which checkpointing does without."
            )
        else:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self._forgets = enabled

    def with_prompt(self, vectors_BTD: Tensor) -> Tensor:
        """Return the vectors behind the soft prompt, (B, P + T, D); as they are without one."""
        if self.config.tuning.mode != "prompt":
            return vectors_BTD
        prompt_PD = self.virtual_PD.to(vectors_BTD.dtype)
        return torch.cat([prompt_PD.expand(len(vectors_BTD), -1, -1), vectors_BTD], 1)

    @property
    def num_prompt_vectors(self) -> int:
        """P of a soft prompt, else 0."""
        tuning = self.config.tuning
        return tuning.num_virtual_tokens if tuning.mode == "prompt" else 0
