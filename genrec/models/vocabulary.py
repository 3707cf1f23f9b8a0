"""Which tokens are the codes in a language model's vocabulary, and where do their rows start?

Codes stand behind the model's own rows, level by level, at the offsets that `ItemIndex` gives. It
refuses to know how a model is loaded or trained.

Shapes: N items, L levels, C code tokens of all levels, V rows of the model, D model width,
E width of item vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genrec.errors import UserError
from genrec.item_index import level_offsets

Start = Literal["mean", "random", "text", "codebook"]


@dataclass(frozen=True)
class CodeVocabulary:
    """The tokens of the codes.

    Args:
        first_token: token of the first code: the number of rows of the model's embedding.
        codebook_sizes: L sizes.
        shared: all levels draw from one vocabulary.
    """

    first_token: int
    codebook_sizes: tuple[int, ...]
    shared: bool = False

    @property
    def names(self) -> list[str]:
        """How the tokens are written, in their order: "<code_LEVEL_CODE>", or "<code_CODE>"."""
        if self.shared:
            return [f"<code_{code}>" for code in range(max(self.codebook_sizes))]
        offsets = level_offsets(self.codebook_sizes, self.shared)
        names = [""] * int(offsets[-1] + self.codebook_sizes[-1])
        for level, (first, size) in enumerate(zip(offsets, self.codebook_sizes, strict=True)):
            names[first : first + size] = [f"<code_{level}_{code}>" for code in range(size)]
        return names

    def extend(self, tokenizer: Any) -> Any:
        """Return a copy of the model's tokenizer that reads and writes the codes.

        A model may have more rows than its tokenizer has tokens; the gap is filled with unused
        ones, so that the codes get their tokens.

        Raises:
            UserError: a tokenizer with more tokens than the model has rows.
        """
        from transformers import AddedToken

        extended = copy.deepcopy(tokenizer)
        gap = self.first_token - len(extended)
        unused = [f"<unused_row_{n}>" for n in range(max(gap, 0))]
        names = self.names
        extended.add_tokens([AddedToken(name, normalized=False) for name in (*unused, *names)])
        found = extended.convert_tokens_to_ids([names[0], names[-1]])
        expected = [self.first_token, self.first_token + len(names) - 1]
        if found != expected:
            raise UserError(
                f"tokenizer: the codes would get the tokens {found[0]} to {found[1]}, expected "
                f"{expected[0]} to {expected[1]}: it has {len(tokenizer)} tokens for a model of "
                f"{self.first_token} rows. Use the tokenizer that belongs to the model."
            )
        return extended


def scattered_rows(old_VD: Tensor, num_codes: int, noise: float) -> Tensor:
    """Return rows around the mean of the old ones, float32 (C, D).

    Args:
        old_VD: the model's rows.
        num_codes: C.
        noise: standard deviation in units of the old rows', per dimension.
    """
    old_VD = old_VD.detach().float()
    draws_CD = torch.randn((num_codes, old_VD.shape[1])).to(old_VD.device)
    return old_VD.mean(0) + noise * old_VD.std(0) * draws_CD


def random_rows(old_VD: Tensor, num_codes: int) -> Tensor:
    """Return rows around zero that are as large as the old ones, float32 (C, D)."""
    return (
        torch.randn((num_codes, old_VD.shape[1])).to(old_VD.device) * old_VD.detach().float().std()
    )


def rows_from_texts(
    old_VD: Tensor, start_CD: Tensor, tokens_NL: Tensor, texts: Sequence[Sequence[int]]
) -> Tensor:
    """Return rows that are means over the descriptions of the items with the code, (C, D).

    Args:
        old_VD: the model's rows.
        start_CD: rows of codes that no described item has; their distance from their mean is added
            to the others, so that codes with the same descriptions differ.
        tokens_NL: code tokens of the items, the first code being 0.
        texts: N lists of text tokens; may be empty.
    """
    described = [n for n, text in enumerate(texts) if len(text)]
    if not described:
        return start_CD
    old_VD = old_VD.detach().float()
    means_ND = torch.stack([old_VD[torch.as_tensor(texts[n])].mean(0) for n in described])
    codes_NL = tokens_NL[described].to(old_VD.device)
    sums_CD, counts_C1 = torch.zeros_like(start_CD), torch.zeros_like(start_CD[:, :1])
    for codes_N in codes_NL.unbind(1):
        sums_CD.index_add_(0, codes_N, means_ND)
        counts_C1.index_add_(0, codes_N, torch.ones_like(means_ND[:, :1]))
    scatter_CD = start_CD - start_CD.mean(0)
    return torch.where(counts_C1 > 0, sums_CD / counts_C1.clamp(min=1) + scatter_CD, start_CD)


def rows_from_vectors(
    old_VD: Tensor,
    start_CD: Tensor,
    tokens_NL: Tensor,
    vectors_NE: np.ndarray,
) -> Tensor:
    """Return rows that lie to each other as the codebooks' vectors do, (C, D).

    A code's vector is the mean, over the items with it, of what the earlier levels leave of their
    vectors: the codebook of a residual quantizer, whichever tokenizer made the codes. A random
    projection brings it to the model's width (Johnson & Lindenstrauss 1984).

    Args:
        old_VD: the model's rows; the new ones get their mean and spread.
        start_CD: rows of codes that no item has.
        tokens_NL: code tokens of the items, the first code being 0.
        vectors_NE: vectors of the items.
    """
    old_VD = old_VD.detach().float()
    rest_NE = torch.from_numpy(np.asarray(vectors_NE, np.float32))
    rest_NE = rest_NE - rest_NE.mean(0)
    projection_ED = torch.randn((rest_NE.shape[1], old_VD.shape[1])) / rest_NE.shape[1] ** 0.5
    rows_CD = start_CD.clone()
    for level in range(tokens_NL.shape[1]):
        used, place_N = np.unique(tokens_NL[:, level].cpu().numpy(), return_inverse=True)
        place = torch.from_numpy(place_N)
        sums = torch.zeros((len(used), rest_NE.shape[1])).index_add_(0, place, rest_NE)
        means = sums / torch.bincount(place)[:, None]
        rest_NE = rest_NE - means[place]
        projected = means @ projection_ED
        scale = projected.std().clamp(min=1e-12) if len(used) > 1 else projected.new_ones(())
        rows = old_VD.mean(0).cpu() + old_VD.std().cpu() * projected / scale
        rows_CD[torch.from_numpy(used).to(rows_CD.device)] = rows.to(rows_CD.device)
    return rows_CD
