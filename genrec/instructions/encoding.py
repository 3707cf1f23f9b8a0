"""How do the pieces of an instruction become tokens of a language model?

Items become their code tokens directly, never through the text tokenizer, so that a code stays one
token whatever stands beside it. It refuses to know which tokens begin or end a text: it is told.

Shapes: N items, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from genrec.errors import UserError
from genrec.instructions.templates import Piece, Rendered


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: what is read, and what is to be answered."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class PieceEncoder:
    """Turns pieces into tokens.

    Args:
        tokenizer: of the model; called without its special tokens.
        tokens_NL: the model's code tokens of all items, int64.
        before: tokens that its tokenizer puts before a text, maybe none.
        after: tokens that it puts behind one, maybe none.
        ends: whether prompts get `after` (encoders read whole texts; a causal model goes on).
        max_tokens: a prompt with its response may have so many.

    Raises:
        UserError: a tokenizer that has neither an end token nor a token for a line break, so that a
            response in words could not end.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokens_NL: np.ndarray,
        before: Sequence[int],
        after: Sequence[int],
        *,
        ends: bool,
        max_tokens: int,
    ) -> None:
        self.tokenizer, self.tokens_NL = tokenizer, tokens_NL
        self.before, self.after = list(before), list(after) if ends else []
        self.max_tokens = max_tokens
        self.end = self._end()
        self.text = lru_cache(maxsize=65536)(self._text)

    def tokens(self, pieces: Iterable[Piece]) -> list[int]:
        """Return the tokens of pieces, with nothing around them."""
        found: list[int] = []
        for piece in pieces:
            found += self.text(piece) if isinstance(piece, str) else self.tokens_NL[piece].tolist()
        return found

    def prompt(self, pieces: Iterable[Piece]) -> list[int]:
        """Return the tokens of a prompt as the model reads a text; too long: its beginning goes."""
        return self._framed(self.tokens(pieces), self.max_tokens)

    def encode(self, text: Rendered) -> Encoded:
        """Return an example in tokens.

        A response that ends with an item needs no end: it has as many codes as there are. Others
        get the tokenizer's end token. What is too long loses the beginning of its prompt, behind
        `before`; a response alone too long is cut.
        """
        response = self.tokens(text.response)
        if not isinstance(text.response[-1], int):
            response = [*response[: self.max_tokens // 2 - len(self.end)], *self.end]
        prompt = self.tokens(text.prompt)
        return Encoded(self._framed(prompt, self.max_tokens - len(response)), response)

    def fits(self, text: Rendered) -> bool:
        """Return whether an example needs no cutting."""
        length = len(self.tokens(text.prompt)) + len(self.tokens(text.response))
        around = len(self.before) + len(self.after) + len(self.end)
        return length + around <= self.max_tokens

    def _framed(self, tokens: list[int], limit: int) -> list[int]:
        room = max(limit - len(self.before) - len(self.after), 1)
        return [*self.before, *tokens[-room:], *self.after]

    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> list[int]:
        if self.tokenizer.eos_token_id is not None:
            return [int(self.tokenizer.eos_token_id)]
        tokens = list(self._text("\n"))
        if not tokens or self.tokenizer.unk_token_id in tokens:
            raise UserError(
                "instructions: the model's tokenizer has no end token and none for a line break, "
                "so that a response in words could never end. Set its eos_token."
            )
        return tokens
