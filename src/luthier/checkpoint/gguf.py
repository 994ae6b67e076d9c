"""From GGUF to a plain checkpoint: dense bf16 weights, config, tokenizer, generation config, card.

For the architecture `llama` (Llama, Mistral, SmolLM and others of that build). A GGUF keeps the rows of
the query and key matrices in the order of interleaved rotary pairs; Hugging Face's classes turn halves, so
the rows are put back. What a file asks for beyond that is refused by name. The tokenizer splits text as
the file says: transformers 5.23, reading a GGUF itself, does not set SmolLM's digits apart, and then
"  12" becomes other tokens than the model was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.checkpoint.card import model_card, put_card
from luthier.checkpoint.gguf_file import GgufFile
from luthier.checkpoint.reader import check_finite
from luthier.checkpoint.writer import ShardWriter, write_folder
from luthier.errors import LuthierError, said

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_DIGITS_APART = {"smollm": True, "gpt-2": False, "default": False}
"""byte-level BPE whose splitting into words is known exactly: the file's name for it → each digit apart"""


class _Info(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def from_gguf(path: Path, out: Path, note: str = "", base: str | None = None) -> Path:
    """Write the model in the GGUF file `path` as a checkpoint folder `out`, atomically; its folder.

    note: a line for the card.  base: the Hub id it names as its base model.
    Raises LuthierError for a damaged file and for what is not understood.
    """
    path, out = Path(path), Path(out)
    try:
        return _converted(GgufFile(path), out, note, base)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "can't allocate memory" in str(error):
            raise
        what = f"holds keys or tensors that make no sense ({type(error).__name__}: {said(str(error))})"
        raise LuthierError(what, where=str(path), do="the file is damaged: get it again") from None


def _converted(file: GgufFile, out: Path, note: str, base: str | None) -> Path:
    path, config = file.path, _config(file)
    names = {name: _disk_name(name, path) for name in file.tensors}
    infos = [_Info(names[n], torch.bfloat16, at.shape) for n, at in file.tensors.items()]
    with write_folder(out) as temp:
        with ShardWriter(temp, infos) as writer:
            for name in file.tensors:
                tensor = _unpermuted(name, file.read(name), config)
                check_finite(name, tensor, path)
                writer.write(names[name], 0, tensor)
        (temp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        (temp / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        _tokenizer(file, temp)
        put_card(temp, _card(file, note, base))
    return out


def _card(file: GgufFile, note: str, base: str | None) -> str:
    said = file.keys.get("general.license")
    note = note or f"weights dequantised from the GGUF file {file.path.name}: small differences are coarse"
    return model_card("", (), base, (note,), license=said if isinstance(said, str) else None)


def _config(file: GgufFile) -> dict[str, Any]:
    keys = file.keys
    arch = keys.get("general.architecture")
    if arch != "llama" or keys.get("llama.expert_count"):
        raise LuthierError(f"is of the architecture {arch!r}; dense llama is read", where=str(file.path))
    if "rope_freqs.weight" in file.tensors or keys.get("llama.rope.scaling.type", "none") != "none":
        raise LuthierError("scales its rotary frequencies, which is not read from GGUF", where=str(file.path))
    heads, hidden = _number(file, "attention.head_count"), _number(file, "embedding_length")
    theta = _shortest(keys.get("llama.rope.freq_base", 10000.0))
    long = {word: _TOKEN_KEYS[word] for word in ("bos", "eos", "pad")}
    ids = {f"{word}_token_id": keys.get(f"tokenizer.ggml.{key}_token_id") for word, key in long.items()}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        "hidden_size": hidden, "intermediate_size": _number(file, "feed_forward_length"),
        "num_hidden_layers": _number(file, "block_count"), "num_attention_heads": heads,
        "num_key_value_heads": keys.get("llama.attention.head_count_kv", heads),
        "head_dim": keys.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _number(file, "context_length"),
        "rms_norm_eps": _shortest(keys.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in file.tensors, "use_cache": True, "dtype": "bfloat16", **ids,
    }  # fmt: skip


_TOKEN_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _number(file: GgufFile, key: str) -> int:
    value = file.keys.get(f"llama.{key}")
    if type(value) is not int or value < 1:
        raise LuthierError(f"llama.{key} should be a number above 0, is {value!r}", where=str(file.path))
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _disk_name(name: str, path: Path) -> str:
    if name in OUTER:
        return OUTER[name]
    found = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.weight", name)
    if not found or found[2] not in INNER:
        raise LuthierError("is not part of a dense llama", where=f"{path}: tensor {name!r}")
    return f"model.layers.{found[1]}.{INNER[found[2]]}.weight"


def _unpermuted(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rows of a query or key matrix from pair order (0, h, 1, h+1, ...) to halves (0, 1, ..., h, h+1, ...)."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    rows, columns = tensor.shape
    pairs = tensor.view(config[heads], rows // config[heads] // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _tokenizer(file: GgufFile, folder: Path) -> None:
    keys = file.keys
    _check_merges(file)
    known = keys.get("tokenizer.ggml.pre") in _DIGITS_APART and not keys.get("tokenizer.ggml.add_bos_token")
    if keys.get("tokenizer.ggml.model") == "gpt2" and known:
        _byte_level(file, folder)
    else:  # slower, and needs the package gguf
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name).save_pretrained(folder)
        except Exception as error:  # each library on the way has its own
            why = said(" ".join(str(error).split()), 120)
            raise LuthierError(f"its tokenizer cannot be read ({why})", where=str(file.path)) from None
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_merges(file: GgufFile) -> None:
    """Each merge joins two tokens to a third; at some that do not the tokenizers library would panic."""
    known = set(file.keys.get("tokenizer.ggml.tokens", []))
    for merge in file.keys.get("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        if not (left and right and {left, right, left + right} <= known):
            raise LuthierError(f"its merges do not fit its tokens ({said(merge)})", where=str(file.path))


def _byte_level(file: GgufFile, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE, straight from the file's lists."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    keys = file.keys
    tokens, merges = keys.get("tokenizer.ggml.tokens", []), keys.get("tokenizer.ggml.merges", [])
    kinds = keys.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens) or not tokens:
        raise LuthierError("its list of tokens is empty, repeats a token, or has no kinds", where=str(file.path))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise LuthierError(f"its merges do not fit its tokens ({str(error)[:80]})", where=str(file.path)) from None
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(keys.get("tokenizer.ggml.add_space_prefix")))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[keys["tokenizer.ggml.pre"]] else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*digits, level])
    made.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.save(str(folder / "tokenizer.json"))
    named = {f"{word}_token": keys.get(f"tokenizer.ggml.{long}_token_id") for word, long in _TOKEN_KEYS.items()}
    about = {name: tokens[i] for name, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    about |= {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": keys.get("llama.context_length"), "padding_side": "right",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
