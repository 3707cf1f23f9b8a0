"""How many codes does a level get? As configured, or fewer where the catalogue is small.

Every quantizer with codebooks shares this setting; what the codes mean is theirs.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field

from genrec.config import StrictConfig
from genrec.runtime import get_logger

log = get_logger(__name__)


class CodebookConfig(StrictConfig):
    """Settings of codebooks that follow the number of items."""

    codebook_size: int = Field(default=256, ge=1)
    """Codes per level, K (TIGER, RPG: 256; OneRec in production: 8192)."""
    min_items_per_code: int = Field(default=0, ge=0)
    """Halve `codebook_size` until this many fitted items, on average, come to a code: one
    configuration then serves small and large catalogues. 0: `codebook_size` as it is."""

    def for_items(self, num_items: int) -> Self:
        """Return the configuration with the codebook size that so many fitted items get."""
        size = self.codebook_size
        while size > 1 and num_items < self.min_items_per_code * size:
            size //= 2
        if size == self.codebook_size:
            return self
        log.info(
            "codebooks: %d codes a level instead of %d, so that %d items come to at least %d a "
            "code (tokenizer.min_items_per_code).",
            size, self.codebook_size, num_items, self.min_items_per_code,
        )  # fmt: skip
        return self.model_copy(update={"codebook_size": size})
