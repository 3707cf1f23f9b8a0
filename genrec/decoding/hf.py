"""How does someone who stays with `transformers.generate` keep to the catalogue?

The index as a LogitsProcessor (vectorised) and as a `prefix_allowed_tokens_fn` (a dictionary, as
most projects write it; the peer in benchmarks/decoding.py). `transformers` is not imported: both
are plain callables of the shape that it expects. It knows no model.

Shapes: R rows (requests times beams), T tokens so far, V vocabulary, L levels, C children.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from genrec.decoding.csr import CSRIndex
from genrec.errors import UserError
from genrec.item_index import ItemIndex


class CatalogueLogitsProcessor:
    """Sets the scores of all tokens that lead to no item to -inf; for `logits_processor=[...]`.

    For scores as in `beam_search` call `generate` with `renormalize_logits=True`, `num_beams`,
    `max_new_tokens=L` and `length_penalty=0.0`; the normalisation runs after this processor.
    Semantic IDs that end early are filled with END to L tokens: leave `eos_token_id` unset, or
    `generate` stops at its first END and returns shorter rows.

    Args:
        index: the catalogue.
        first_token: the token of code 0 of level 0 (`ItemIndex.to_tokens`).
        prompt_length: tokens in `input_ids` before the first code: 1 for an encoder-decoder (its
            start token), the padded prompt's length for a causal LM.
    """

    def __init__(self, index: ItemIndex, *, first_token: int, prompt_length: int) -> None:
        self.constraint = CSRIndex.from_index(index)
        self.first_tokens = [first_token + int(offset) for offset in index.level_offsets]
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (R, V) with -inf where the prefix in `input_ids` (R, T) may not go."""
        level = input_ids.shape[1] - self.prompt_length
        _check_level(level, len(self.first_tokens))
        self.constraint = self.constraint.to(scores.device)
        nodes_R = self.constraint.root(len(input_ids))
        for done in range(level):
            codes_R = input_ids[:, self.prompt_length + done] - self.first_tokens[done]
            nodes_R = self.constraint.levels[done].find(nodes_R, codes_R)
        children = self.constraint.children(nodes_R, level)
        tokens_RC = children.codes_RC + self.first_tokens[level]
        found_RC = scores.gather(1, tokens_RC).masked_fill(~children.valid_RC, -torch.inf)
        # amax: padding columns repeat tokens, and must not hide the valid column.
        return torch.full_like(scores, -torch.inf).scatter_reduce(1, tokens_RC, found_RC, "amax")


def prefix_allowed_tokens_fn(
    index: ItemIndex, *, first_token: int, prompt_length: int
) -> Callable[[int, Tensor], list[int]]:
    """Return a function for `generate(prefix_allowed_tokens_fn=...)`.

    Args:
        index: the catalogue.
        first_token: the token of code 0 of level 0.
        prompt_length: as in `CatalogueLogitsProcessor`.
    """
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for tokens in index.tokens(first_token).tolist():
        for level, token in enumerate(tokens):
            found[tuple(tokens[:level])].add(token)
    allowed = {prefix: sorted(tokens) for prefix, tokens in found.items()}
    first_tokens = [first_token + int(offset) for offset in index.level_offsets]

    def allowed_tokens(request: int, input_ids: Tensor) -> list[int]:
        prefix = tuple(input_ids[prompt_length:].tolist())
        _check_level(len(prefix), len(first_tokens))
        # `generate` fills a beam that is wider than the tree with prefixes of score -inf, and
        # refuses an empty answer for them.
        return allowed.get(prefix, [first_tokens[len(prefix)]])

    return allowed_tokens


def _check_level(level: int, num_levels: int) -> None:
    if not 0 <= level < num_levels:
        raise UserError(
            f"generate: got {level} tokens after the prompt, expected 0 to {num_levels - 1}: items "
            f"have {num_levels} codes. Set max_new_tokens={num_levels} and check prompt_length."
        )
