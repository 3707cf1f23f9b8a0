"""G of IDGenRec: a sequence-to-sequence model that names an item by a short phrase (2403.19021).

A small T5 trained from scratch to say the salient words of an item's own text, or a pretrained
model. It knows texts and codes; which items get which phrase is decided in `textual.py`, and how a
recommender trains it further in `genrec.trainers.alternation`.

Shapes: M texts, B texts of a batch, T input tokens, L codes, G groups, V codes of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from genrec.errors import TrainingError, UserError
from genrec.item_index import END
from genrec.runtime import choose_device, progress
from genrec.tokenizers.text.subwords import UNMAPPED, Subwords

if TYPE_CHECKING:
    from genrec.tokenizers.textual import Textual

IntArray = np.ndarray
IGNORED = -100  # what torch's cross_entropy skips
WEIGHT = "generator."
CONFIG = "generator_config"
LOCAL = ("_name_or_path", "transformers_version", "dtype")  # no part of what was learned
BLOCK_BATCHES = 16


class PhraseGenerator(nn.Module):
    """An encoder-decoder whose outputs are held to the codes of a sub-word vocabulary.

    Args:
        model: a Hugging Face sequence-to-sequence model.
        subwords: its tokenizer, cut down to the catalogue's sub-words: the V outputs.
        max_text_tokens: input tokens of a text; the rest is cut.
    """

    token_V: Tensor
    available_V: Tensor

    def __init__(self, model: Any, subwords: Subwords, max_text_tokens: int) -> None:
        super().__init__()
        self.model, self.subwords, self.max_text_tokens = model, subwords, max_text_tokens
        self.start = int(model.config.decoder_start_token_id)
        end = model.config.eos_token_id
        tokens = subwords.token_ids()
        tokens[END] = end[0] if isinstance(end, list) else end
        self.register_buffer("token_V", torch.from_numpy(tokens), persistent=False)
        self.register_buffer("available_V", self.token_V != UNMAPPED, persistent=False)

    @classmethod
    def small(cls, subwords: Subwords, config: Textual.Config) -> Self:
        """Return an untrained T5 over sub-words that were trained on the catalogue."""
        words = subwords.tokenizer.get_vocab_size()
        t5_config = T5Config(
            vocab_size=words + 2,
            d_model=config.d_model,
            d_kv=config.d_model // config.num_heads,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=config.dropout,
            eos_token_id=words,
            pad_token_id=words + 1,
        )
        t5_config.decoder_start_token_id = words + 1
        return cls(T5ForConditionalGeneration(t5_config), subwords, config.max_text_tokens)

    @classmethod
    def pretrained(cls, source: str, texts: Sequence[str], max_text_tokens: int) -> Self:
        """Load a model and its tokenizer from a folder or by a name known on this machine.

        Raises:
            UserError: none there, or not a sequence-to-sequence model.
        """
        subwords = Subwords.pretrained(source, texts)
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                source, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer.generator: got {source!r}, which is no sequence-to-sequence model "
                f"({str(error).splitlines()[0]}). Expected 'train', or a folder or name of a "
                "Hugging Face encoder-decoder (T5) on this machine."
            ) from None
        return cls(model, subwords, max_text_tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_V.device

    # -- training and probabilities -----------------------------------------------------------

    def inputs(self, texts: Sequence[str], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return input tokens (B, T), END's token last, and which exist, bool (B, T).

        Args:
            texts: B texts.
            width: T; default the longest text's.
        """
        end = int(self.token_V[END])
        rows = []
        for encoding in self.subwords.encodings(texts):
            rows.append([*encoding.ids[: self.max_text_tokens - 1], end])
        width = width or max(len(row) for row in rows)
        tokens_BT = torch.full((len(rows), width), end)
        exists_BT = torch.zeros((len(rows), width), dtype=torch.bool)
        for place, row in enumerate(rows):
            tokens_BT[place, : len(row)] = torch.tensor(row)
            exists_BT[place, : len(row)] = True
        return tokens_BT.to(self.device), exists_BT.to(self.device)

    def logits(self, texts: Sequence[str], codes_BL: Tensor) -> Tensor:
        """Return logits (B, L, V) of each code given the text and the codes before it."""
        tokens_BT, exists_BT = self.inputs(texts)
        output = self.model(
            input_ids=tokens_BT,
            attention_mask=exists_BT.long(),
            decoder_input_ids=self._decoder_tokens(codes_BL[:, :-1]),
            use_cache=False,
        )
        return self._over_codes(output.logits)

    def loss(self, texts: Sequence[str], codes_BL: Tensor) -> Tensor:
        """Return the mean cross-entropy of phrases up to and including their END."""
        over_BL = (codes_BL == END).cumsum(1) > 1
        target_BL = codes_BL.masked_fill(over_BL, IGNORED)
        return F.cross_entropy(self.logits(texts, codes_BL).flatten(0, 1), target_BL.flatten())

    def _decoder_tokens(self, codes_BL: Tensor) -> Tensor:
        return F.pad(self.token_V[codes_BL].clamp(min=0), (1, 0), value=self.start)

    def _over_codes(self, logits: Tensor) -> Tensor:
        """Return logits of the codes: END, bytes and sub-words; -inf for bytes it lacks."""
        kept = logits[..., self.token_V.clamp(min=0)]
        return kept.masked_fill(~self.available_V, -torch.inf)

    # -- phrases ------------------------------------------------------------------------------

    def phrases(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int,
        num_groups: int = 1,
        penalty: float = 0.0,
        min_tokens: Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> IntArray:
        """Return phrases by diverse beam search with one beam per group (2403.19021, 1610.02424).

        The first group takes the most probable code at every step; each later group pays `penalty`
        (in nats) for a code, times the number of earlier groups of the same text that took it at
        this step. In double precision and without dropout: a text's phrases do not depend on the
        texts beside it.

        Args:
            texts: M texts.
            max_tokens: L; phrases may fill all of it without END.
            num_groups: G phrases per text.
            penalty: diversity penalty.
            min_tokens: per text, codes before END may come; default 1.
            batch_size: texts at a time.

        Returns:
            codes (M, G, L) int32, END where shorter.
        """
        least = np.ones(len(texts), np.int64) if min_tokens is None else np.asarray(min_tokens)
        found = np.full((len(texts), num_groups, max_tokens), END, dtype=np.int32)
        before, training = self.device, self.training
        self.eval().to(choose_device(), torch.float64)
        with torch.inference_mode(), progress("phrases", len(texts)) as advance:
            for start in range(0, len(texts), batch_size):
                chosen = slice(start, start + batch_size)
                least_B = torch.from_numpy(least[chosen]).to(self.device)
                codes = self._search(texts[chosen], max_tokens, num_groups, penalty, least_B)
                found[chosen] = codes.cpu().numpy()
                advance(len(codes))
        self.to(before, torch.float32).train(training)
        return found

    def _search(
        self, texts: Sequence[str], max_tokens: int, groups: int, penalty: float, least_B: Tensor
    ) -> Tensor:
        # One width for all: sums over a padded axis may round differently from width to width.
        tokens_BT, exists_BT = self.inputs(texts, self.max_text_tokens)
        hidden = self.model.get_encoder()(input_ids=tokens_BT, attention_mask=exists_BT.long())[0]
        encoded = BaseModelOutput(last_hidden_state=hidden.repeat_interleave(groups, 0))
        visible = exists_BT.long().repeat_interleave(groups, 0)
        last_BG = torch.full((len(texts), groups), self.start, device=self.device)
        live_BG = torch.ones_like(last_BG, dtype=torch.bool)
        cache, chosen = None, []
        for step in range(max_tokens):
            output = self.model(
                encoder_outputs=encoded,
                attention_mask=visible,
                decoder_input_ids=last_BG.reshape(-1, 1),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logprobs = self._over_codes(output.logits[:, -1]).log_softmax(-1)
            logprobs_BGV = logprobs.reshape(len(texts), groups, -1)
            too_short = (least_B > step)[:, None].expand(-1, groups)
            logprobs_BGV[..., END].masked_fill_(too_short, -torch.inf)
            codes_BG = _pick(logprobs_BGV, live_BG, penalty)
            chosen.append(codes_BG)
            live_BG = live_BG & (codes_BG != END)
            last_BG = self.token_V[codes_BG]
            if not live_BG.any():
                break
        codes = torch.stack(chosen, dim=2)
        return F.pad(codes, (0, max_tokens - codes.shape[2]), value=END)

    # -- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return sub-words, the model's configuration (JSON in UTF-8) and its weights."""
        facts = {k: v for k, v in self.model.config.to_dict().items() if k not in LOCAL}
        config = json.dumps(facts, sort_keys=True).encode()
        weights: dict[str, np.ndarray] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen:  # tied weights once
                seen.add(tensor.data_ptr())
                weights[WEIGHT + name] = tensor.detach().cpu().numpy().copy()
        config_array = np.frombuffer(config, dtype=np.uint8).copy()
        return {**self.subwords.state(), CONFIG: config_array, **weights}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], max_text_tokens: int) -> Self:
        """Return the generator that `state` described."""
        facts = json.loads(np.asarray(state[CONFIG], dtype=np.uint8).tobytes())
        start = facts.get("decoder_start_token_id")
        config = AutoConfig.for_model(facts.pop("model_type"), **facts)
        config.decoder_start_token_id = start
        with torch.random.fork_rng():  # its fresh weights are thrown away
            model = AutoModelForSeq2SeqLM.from_config(config)
        found = {
            name.removeprefix(WEIGHT): torch.from_numpy(np.array(array))
            for name, array in state.items()
            if name.startswith(WEIGHT)
        }
        model.load_state_dict(found, strict=False)
        model.tie_weights()
        return cls(model, Subwords.from_state(state), max_text_tokens)


def _pick(logprobs_BGV: Tensor, live_BG: Tensor, penalty: float) -> Tensor:
    """Return each group's next code (B, G); a finished group repeats END and costs nobody."""
    taken_BV = torch.zeros_like(logprobs_BGV[:, 0])
    picked = []
    for group in range(logprobs_BGV.shape[1]):
        code_B = (logprobs_BGV[:, group] - penalty * taken_BV).argmax(-1)
        code_B = code_B.masked_fill(~live_BG[:, group], END)
        count_B1 = live_BG[:, group, None].to(taken_BV.dtype)
        taken_BV.scatter_add_(1, code_B[:, None], count_B1)
        picked.append(code_B)
    return torch.stack(picked, dim=1)


def train_on_phrases(
    generator: PhraseGenerator, texts: Sequence[str], codes_NL: IntArray, config: Textual.Config
) -> list[float]:
    """Train a generator to say given phrases; return the mean loss of each epoch (nats per code).

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rng = np.random.default_rng(config.seed)
    generator.train()
    history = []
    with progress("phrase generator", config.num_epochs) as advance:
        for _ in range(config.num_epochs):
            losses = []
            for rows in _batches(rng, texts, config.batch_size):
                codes_BL = torch.from_numpy(codes_NL[rows].astype(np.int64)).to(generator.device)
                loss = generator.loss([texts[row] for row in rows], codes_BL)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.detach())
            history.append(float(torch.stack(losses).mean()))
            if not np.isfinite(history[-1]):
                raise TrainingError(
                    f"textual: the generator's loss became {history[-1]}. Lower "
                    f"tokenizer.learning_rate (now {config.learning_rate})."
                )
            advance(1)
    generator.eval()
    return history


def _batches(rng: np.random.Generator, texts: Sequence[str], batch_size: int) -> Iterator[IntArray]:
    """Yield batches of texts of similar length (less padding) in random order."""
    lengths = np.array([len(text) for text in texts])
    order = rng.permutation(len(texts))
    batches: list[IntArray] = []
    for start in range(0, len(order), batch_size * BLOCK_BATCHES):
        rows = order[start : start + batch_size * BLOCK_BATCHES]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(np.array_split(rows, range(batch_size, len(rows), batch_size)))
    for place in rng.permutation(len(batches)):
        yield batches[place]
