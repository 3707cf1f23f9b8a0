"""Sub-words: the vocabulary that turns any text into codes and codes back into text.

Trained on the catalogue's own texts, or a pretrained tokenizer cut down to the sub-words that the
catalogue uses. Code 0 is END, codes 1 to 256 are the 256 bytes, sub-words follow: what no sub-word
covers is spelled in bytes, so that no text is without codes. It knows neither items nor models.

Shapes: M texts, L codes at most, V codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from genrec.errors import UserError
from genrec.item_index import END

IntArray = np.ndarray
FIRST_BYTE = 1
FIRST_SUBWORD = FIRST_BYTE + 256
TRAIN = "train"
UNMAPPED = -1
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MIN_FREQUENCY = 2  # a pair that occurs once teaches nothing about the next title


class Subwords:
    """Codes for texts: bytes and sub-words in one vocabulary.

    Args:
        tokenizer: a Hugging Face tokenizer; its truncation and padding are switched off.
        kept: ids of the sub-words that get codes `FIRST_SUBWORD`.., in this order. A sub-word that
            spells a single byte has that byte's code and is not among them.
    """

    def __init__(self, tokenizer: Tokenizer, kept: Sequence[int] | IntArray) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.kept = np.asarray(kept, dtype=np.int64)
        self._spell = _Speller(tokenizer)
        bytes_only = [bytes([value]) for value in range(256)]
        self._pieces = [b"", *bytes_only, *(self._spell(int(i)) for i in self.kept)]
        self._code_by_id = {int(i): code for code, i in enumerate(self.kept, FIRST_SUBWORD)}

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Self:
        """Train byte-level byte-pair encoding (Sennrich et al. 2016) on texts.

        Deterministic, and independent of the order of the texts.

        Args:
            texts: what to learn from.
            size: codes at most, V; fewer if the texts hold fewer repeated pairs.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size - FIRST_BYTE,
            min_frequency=MIN_FREQUENCY,
            initial_alphabet=sorted(alphabet),
            special_tokens=[],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, range(len(alphabet), tokenizer.get_vocab_size()))

    @classmethod
    def pretrained(cls, source: str, texts: Sequence[str]) -> Self:
        """Load a pretrained tokenizer and keep the sub-words that the texts use.

        Args:
            source: folder, `tokenizer.json`, or the name of a tokenizer that is on this machine.
            texts: the catalogue's texts.

        Raises:
            UserError: there is no fast Hugging Face tokenizer of that name here.
        """
        whole = cls(_load(source), [])
        used: set[int] = set()
        for encoding in whole.encodings(texts):
            used.update(encoding.ids)
        kept = [i for i in sorted(used) if i != whole._spell.unknown and len(whole._spell(i)) > 1]
        return cls(whole.tokenizer, kept)

    @classmethod
    def make(cls, source: str, texts: Sequence[str], size: int) -> Self:
        """Return `train(texts, size)` for the source "train", else `pretrained(source, texts)`."""
        return cls.train(texts, size) if source == TRAIN else cls.pretrained(source, texts)

    @property
    def size(self) -> int:
        """Number of codes, V: END, 256 bytes and the sub-words."""
        return len(self._pieces)

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokenizer's own view of texts, without special tokens."""
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Return the codes of a text that is not empty, without END; at least one."""
        return self._codes(text, self.encodings([text])[0])

    def encode_all(self, texts: Sequence[str], max_codes: int) -> tuple[IntArray, IntArray]:
        """Return the codes of texts, cut to `max_codes` and filled up with END.

        Returns:
            codes (M, max_codes) int32, and the number of codes before cutting, (M,) int64.
        """
        codes_ML = np.full((len(texts), max_codes), END, dtype=np.int32)
        lengths_M = np.zeros(len(texts), dtype=np.int64)
        for row, encoding in enumerate(self.encodings(texts)):
            codes = self._codes(texts[row], encoding)
            lengths_M[row] = len(codes)
            codes_ML[row, : len(codes)] = codes[:max_codes]
        return codes_ML, lengths_M

    def _codes(self, text: str, encoding: Encoding) -> list[int]:
        codes: list[int] = []
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            code = self._code_by_id.get(token)
            if code is not None:
                codes.append(code)
                continue
            spelled = self._spell(token)
            if token == self._spell.unknown:  # the text itself, with the blank before it
                blank = " " if start and text[start - 1].isspace() else ""
                spelled = (blank + text[start:stop]).encode()
            codes.extend(FIRST_BYTE + value for value in spelled)
        return codes or [FIRST_BYTE + value for value in text.encode()]

    def decode(self, codes: Iterable[int]) -> str:
        """Return the text of codes up to END; codes beyond V (numbers of collisions) read " #n"."""
        spelled, numbers = [], []
        for code in codes:
            if code == END:
                break
            if code < self.size:
                spelled.append(self._pieces[code])
            else:
                numbers.append(f" #{code - self.size + 1}")
        text = b"".join(spelled).decode("utf-8", errors="replace").removeprefix(" ")
        return text + "".join(numbers)

    def token_ids(self) -> IntArray:
        """Return the tokenizer's id of each code, (V,) int64; -1 for END and for bytes it lacks."""
        ids = np.full(self.size, UNMAPPED, dtype=np.int64)
        ids[FIRST_SUBWORD:] = self.kept
        for token in sorted(self.tokenizer.get_vocab().values(), reverse=True):
            spelled = self._spell(token) if token != self._spell.unknown else b""
            if len(spelled) == 1 and token not in self._code_by_id:
                ids[FIRST_BYTE + spelled[0]] = token
        return ids

    def state(self) -> dict[str, np.ndarray]:
        """Return the vocabulary as arrays: the tokenizer's JSON in UTF-8 and the kept ids."""
        text = self.tokenizer.to_str().encode()
        return {
            "subwords_json": np.frombuffer(text, dtype=np.uint8).copy(),
            "subwords_kept": self.kept,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Return the vocabulary that `state` described."""
        text = np.asarray(state["subwords_json"], dtype=np.uint8).tobytes().decode()
        return cls(Tokenizer.from_str(text), state["subwords_kept"])


class _Speller:
    """The bytes that a sub-word adds to a text, its leading blank included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unknown = _unknown_id(tokenizer)
        self.byte_level = "ByteLevel" in str(tokenizer.decoder)
        self.special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        letters = (i for i in range(tokenizer.get_vocab_size()) if self._is_word(i))
        self.anchor = None if self.byte_level else next(letters, None)
        self.cache: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        if token not in self.cache:
            self.cache[token] = self._spell(token)
        return self.cache[token]

    def _spell(self, token: int) -> bytes:
        text = self.tokenizer.id_to_token(token)
        if text is None or token in self.special:
            return b""
        if self.byte_level:
            return _bytes_of(text)
        if found := BYTE_TOKEN.fullmatch(text):
            return bytes([int(found[1], 16)])
        # How a sub-word joins what stands before it ("##ing", "▁foo") is the decoder's secret: so
        # it is decoded behind another word, and that word taken away again.
        if self.anchor is None:
            return text.encode()
        before = self.tokenizer.decode([self.anchor], skip_special_tokens=False)
        both = self.tokenizer.decode([self.anchor, token], skip_special_tokens=False)
        return both.removeprefix(before).encode()

    def _is_word(self, token: int) -> bool:
        text = self.tokenizer.id_to_token(token)
        return text is not None and text.lstrip("▁").isalpha() and token not in self.special


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    name = getattr(tokenizer.model, "unk_token", None)
    if name is None:
        found = (t for t in ("<unk>", "[UNK]") if tokenizer.token_to_id(t) is not None)
        name = next(found, None)
    return None if name is None else tokenizer.token_to_id(name)


def _byte_by_letter() -> dict[str, int]:
    """Return the byte behind each letter of the byte-level alphabet (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    table = {chr(value): value for value in plain}
    return table | {chr(256 + place): value for place, value in enumerate(others)}


BYTE_BY_LETTER = _byte_by_letter()


def _bytes_of(text: str) -> bytes:
    if any(letter not in BYTE_BY_LETTER for letter in text):  # a token added as it reads
        return text.encode()
    return bytes(BYTE_BY_LETTER[letter] for letter in text)


def _load(source: str) -> Tokenizer:
    path = Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if path.is_absolute() and not path.exists():
            raise FileNotFoundError("there is no such folder or file")
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer: Tokenizer = found.backend_tokenizer
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, ...
        raise UserError(
            f"tokenizer: no sub-words at {source!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}). Expected 'train', a folder "
            "with a tokenizer.json, or the name of a fast Hugging Face tokenizer on this machine."
        ) from None
    return tokenizer
