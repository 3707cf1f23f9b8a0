"""Tiny random language models with tokenizers, as folders: the shapes of real families in seconds.

They stand in for pretrained models where a test or a trial needs a folder and no network. Nothing
is learned in them, so nothing that they answer means anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

Family = Literal["llama", "gpt2", "qwen3", "gemma2", "t5", "bart"]
FAMILIES: tuple[Family, ...] = ("llama", "gpt2", "qwen3", "gemma2", "t5", "bart")
WIDTH = 32
UNUSED_ROWS = 7
"""Rows of the Qwen-like model beyond its tokenizer's tokens."""


def tiny_language_model(folder: str | Path, family: Family = "llama", **changes: Any) -> Path:
    """Write a tiny random model and its tokenizer, and return the folder.

    Args:
        folder: to write.
        family: "llama" (its tokenizer puts a start token first), "gpt2" and "qwen3" (byte-level, no
            start, no padding token; Qwen's model has more rows than tokens), "gemma2" (capped
            logits), "t5" (puts an end token last), "bart" (both).
        changes: of the model's configuration, such as `tie_word_embeddings`.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    rows = len(tokenizer) + (UNUSED_ROWS if family == "qwen3" else 0)
    config = _config(family, rows, tokenizer, changes)
    auto: Any = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    auto.from_config(config).save_pretrained(folder)
    return folder


def tiny_tokenizer(family: Family) -> Any:
    """Return a tokenizer over bytes, or over letters for "t5", with the family's special tokens."""
    if family == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
        pieces += [(chr(code), -4.0) for code in range(33, 127)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        first = {"llama": ["<s>", "</s>"], "gemma2": ["<s>"], "bart": ["<s>", "<pad>", "</s>"]}
        names = [*first.get(family, []), *alphabet]
        if family in ("gpt2", "qwen3"):
            names.append("<|endoftext|>")
        vocabulary = {name: number for number, name in enumerate(names)}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {
            "llama": {"bos_token": "<s>", "eos_token": "</s>"},
            "gemma2": {"bos_token": "<s>"},
            "bart": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"},
        }.get(family, {"eos_token": "<|endoftext|>"})
    frame = {"llama": "<s> $A", "gemma2": "<s> $A", "t5": "$A </s>", "bart": "<s> $A </s>"}
    if family in frame:
        used = [name for name in frame[family].split() if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frame[family],
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in used],
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _config(family: Family, rows: int, tokenizer: Any, changes: dict[str, Any]) -> Any:
    ids = {
        "vocab_size": rows,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    modern = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return transformers.LlamaConfig(**{**ids, **modern, **changes})
    if family == "qwen3":
        return transformers.Qwen3Config(**{**ids, **modern, "head_dim": 8, **changes})
    if family == "gemma2":
        own = {"head_dim": 8, "sliding_window": 128, "final_logit_softcapping": 30.0}
        return transformers.Gemma2Config(**{**ids, **modern, **own, **changes})
    if family == "gpt2":
        own = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 256}
        return transformers.GPT2Config(**{**ids, **own, "initializer_range": 0.2, **changes})
    if family == "t5":
        own = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        start = {"decoder_start_token_id": tokenizer.pad_token_id}
        return transformers.T5Config(**{**ids, **own, **start, **changes})
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    own = {"d_model": WIDTH, "max_position_embeddings": 256, "init_std": 0.2}
    start = {"decoder_start_token_id": tokenizer.eos_token_id}
    return transformers.BartConfig(**{**ids, **sizes, **own, **start, **changes})
