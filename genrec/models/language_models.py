"""Which language model stands under a backbone, and is it the one that was meant?

It finds, loads and fingerprints models of Hugging Face from a folder, a hub name or an asset, with
their text tokenizers. It refuses to know items, codes and training.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as hf_logging

from genrec import artifacts, assets, runtime
from genrec.errors import AssetError, ConfigError, UserError

log = runtime.get_logger(__name__)

Kind = Literal["causal", "seq2seq"]
DataType = Literal["float32", "bfloat16"]
Quantization = Literal["bnb-int8", "bnb-nf4", "torchao-int8"]
ASSET = "asset:"
SHARED_KEYS = "genrec_shared_keys"
_CLASSES = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
_BACKBONES = {"causal": "pretrained_causal", "seq2seq": "pretrained_seq2seq"}


@dataclass(frozen=True)
class Place:
    """Where a model is: a local folder, or a name on the hub."""

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of every `from_pretrained`."""
        return {"local_files_only": True} if Path(self.name).is_dir() else {}


def find_place(source: str) -> Place:
    """Return where a source lies.

    A GGUF file is read by transformers in Python, which takes its time; its plain float32 copy is
    kept in the assets folder, under the file's checksum.

    Args:
        source: a folder, a GGUF file, "asset:NAME", or a name on the hub.

    Raises:
        AssetError: an asset that is not on this machine, or GGUF without the package that reads it.
    """
    name = str(assets.resolve(source.removeprefix(ASSET))) if source.startswith(ASSET) else source
    path = Path(name)
    file = None
    if path.is_file() and path.suffix == ".gguf":
        path, file = path.parent, path.name
    elif path.is_dir() and not (path / "config.json").is_file():
        file = next((found.name for found in sorted(path.glob("*.gguf"))), None)
    return Place(str(path) if file is None else str(_plain_copy(path, file)))


def _plain_copy(folder: Path, file: str) -> Path:
    """Return the folder with the plain copy of a GGUF file, made if it is not there."""
    checksum = artifacts.file_checksum(folder / file)
    copy = assets.assets_dir() / "converted" / checksum[:16]
    if copy.is_dir():
        return copy
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            f"model.source: {str(folder / file)!r} is a GGUF file, which transformers reads with "
            "the package gguf; it is not installed. Run `pip install 'genrec[gguf]'`."
        )
    log.info("converting %s to plain float32, once: %s", file, copy)
    with _silent():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model.hf_quantizer = None  # else it refuses to be saved, though its weights are plain by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with artifacts.atomic_directory(copy) as temporary, _silent():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return copy


def load_language_model(
    source: str, kind: Kind, *, dtype: DataType = "float32", quantization: str | None = None
) -> PreTrainedModel:
    """Return a model in evaluation mode, on the CPU.

    Raises:
        UserError: nothing there, no network, or a model of the other kind.
        ConfigError: quantization without the library for it.
    """
    place = find_place(source)
    options = {**place.options, "dtype": getattr(torch, dtype), **_quantized(quantization)}
    try:
        config = AutoConfig.from_pretrained(place.name, **place.options)
    except (OSError, ValueError) as error:
        raise _not_found(source, error) from None
    if bool(config.is_encoder_decoder) != (kind == "seq2seq"):
        other: Kind = "causal" if kind == "seq2seq" else "seq2seq"
        raise UserError(
            f"model.source: {source!r} holds a {config.model_type} model, expected a {kind} one "
            f"for model.name={_BACKBONES[kind]}. Set model.name={_BACKBONES[other]}."
        )
    options |= {"use_safetensors": True}  # nothing is ever unpickled
    wanted = attention_of(config, kind)
    for attention in dict.fromkeys((wanted, "eager" if wanted == SHARED_KEYS else wanted)):
        try:
            with _silent():
                model = _CLASSES[kind].from_pretrained(
                    place.name, attn_implementation=attention, **options
                )
            return model.eval()
        except (OSError, ValueError) as error:  # old classes take no attention but their own
            problem = _not_found(source, error)
    raise problem


def empty_language_model(
    architecture: Mapping[str, Any], kind: Kind, *, dtype: DataType
) -> PreTrainedModel:
    """Return a model of an architecture (`config.to_dict()`) to load weights into."""
    options = {k: v for k, v in architecture.items() if k != "model_type"}
    config = AutoConfig.for_model(architecture["model_type"], **options)
    return (
        _CLASSES[kind]
        .from_config(
            config, attn_implementation=attention_of(config, kind), dtype=getattr(torch, dtype)
        )
        .eval()
    )


def load_text_tokenizer(source: str) -> Any:
    """Return the tokenizer that belongs to a model; raises `UserError` if there is none."""
    place = find_place(source)
    try:
        return AutoTokenizer.from_pretrained(place.name, **place.options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.source: {source!r} has no tokenizer that can be read "
            f"({_first_line(error)}). Expected the tokenizer's files beside the model's."
        ) from None


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of all weights that the model came with (adapters left out)."""
    parts: list[Any] = []
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            parts.append([name.replace(".base_layer.", "."), str(weight.dtype)])
            for part in _stored(weight.detach()):
                parts.append(part.cpu().contiguous().view(torch.uint8).numpy())
    return artifacts.fingerprint(*parts)


def _stored(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a weight consists of: torchao's hold numbers and scales apart."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(weight, name))]


def source_fingerprint(source: str) -> str | None:
    """Return a digest of a local source's files, None for a name on the hub."""
    place = find_place(source)
    folder = Path(place.name)
    if not folder.is_dir():
        return None
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors", ".model")]
    return artifacts.fingerprint([[path.name, artifacts.file_checksum(path)] for path in files])


def frame_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return what stands before and after the items, in the tokenizer's own tokens.

    Whatever the tokenizer puts around a text (a start, an end, both, neither) goes where it puts
    it; nothing is assumed about which tokens these are.

    Args:
        tokenizer: of the model.
        text: stands before the items; may be empty.
    """
    probe = text or "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    whole = tokenizer(probe)["input_ids"]
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            before, after = whole[:first], whole[first + len(plain) :]
            return [*before, *(plain if text else [])], after
    return whole, []


def attention_of(config: Any, kind: Kind) -> str | None:
    """Return the attention implementation to load a model with; None: the library's choice."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"  # the only one that caps
    return SHARED_KEYS if kind == "seq2seq" else None


def shared_keys_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as "sdpa" does; rows of a request may share its one copy of keys and values.

    Args:
        module: the layer.
        query: (R, h, 1, d), or (B, h, T', d) as usual.
        key: (B, h, T, d).
        value: (B, h, T, d).
        mask: as "sdpa" takes it, of B requests.
        options: passed on.
    """
    num_rows, num_requests = len(query), len(key)
    if num_rows == num_requests:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    folded = query.reshape(num_requests, -1, *query.shape[1:]).squeeze(3).transpose(1, 2)
    mixed, _ = sdpa_attention_forward(module, folded, key, value, mask, **options)
    return mixed.reshape(num_rows, 1, *mixed.shape[2:]), None


AttentionInterface.register(SHARED_KEYS, shared_keys_attention)
AttentionMaskInterface.register(SHARED_KEYS, sdpa_mask)


@contextmanager
def _silent() -> Iterator[None]:
    """Do without the library's progress bars, which `runtime.progress` knows nothing about."""
    on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            hf_logging.enable_progress_bar()


def _quantized(quantization: str | None) -> dict[str, Any]:
    """Return the options that quantize a base on loading."""
    if quantization is None:
        return {}
    library = "torchao" if quantization.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"model.quantization: got {quantization!r}, which needs the package {library}; it is "
            f"not installed. Run `pip install {library}`, or leave model.quantization out."
        )
    if library == "torchao":
        from transformers import TorchAoConfig

        kinds = importlib.import_module("torchao.quantization")  # the user's, none of our extras
        return {"quantization_config": TorchAoConfig(kinds.Int8WeightOnlyConfig())}
    from transformers import BitsAndBytesConfig

    kind = (
        {"load_in_8bit": True}
        if quantization == "bnb-int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    return {"quantization_config": BitsAndBytesConfig(**kind)}


def _not_found(source: str, error: Exception) -> UserError:
    return UserError(
        f"model.source: got {source!r}, which is no folder with a model here and could not be "
        f"fetched either ({_first_line(error)}). Expected a folder with config.json and "
        "safetensors, a name on the hub (with a network connection), or asset:smollm2."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
