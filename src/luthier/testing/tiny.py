"""Tiny models, tokenizers and data, made in code: no network, no files but those asked for, instant."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.flows import Item

PAD, EOS, START, END = "<pad>", "<eos>", "<|start|>", "<|end|>"
MERGES = [
    "Ġ t",
    "Ġ a",
    "h e",
    "i n",
    "r e",
    "o n",
    "Ġt he",
    "e r",
    "Ġ s",
    "a t",
    "n d",
    "Ġ =",
    "Ġ +",
    "e n",
    "Ġ i",
    "o r",
]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCAB = 4 + 256 + len(MERGES)
"""Tokens of `tokenizer()`, and the default vocabulary of `llama()`."""


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE that reads any text without loss: pad, eos, 256 bytes and a few merges, 276 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [PAD, EOS, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(m.split()[0], m.split()[1]) for m in MERGES]
    pieces += [left + right for left, right in pairs]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, EOS, START, END)])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, model_max_length=256)
    fast.padding_side = "left"
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> LlamaForCausalLM:
    """A Llama of two layers, width 32, two query heads to one key-value head; keywords change its config.

    Weights are drawn from their own generator, on the CPU in fp32, so the global one is untouched. They
    are larger than a fresh model's, so that logits differ clearly between tokens.
    """
    config = LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False,
        "attn_implementation": "sdpa", **sizes,
    })  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    return cast_(redraw_(model, seed).eval(), dtype)


def host(needs: Sequence[str] = (), seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The tiny Llama with what a method's `needs` asks of its model: a mask token (3), attention both ways."""
    asked = {"mask_token": {"mask_token_id": 3}, "bidirectional": {"is_causal": False}}
    return llama(seed, dtype, **{k: v for need in needs for k, v in asked.get(need, {}).items()})


def cast_(model: nn.Module, dtype: torch.dtype) -> Any:
    """Parameters to `dtype`; buffers stay, since rotary frequencies in bfloat16 shift the logits."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def redraw_(model: nn.Module, seed: int, std: float = 0.1) -> Any:
    """Draw every weight of a model anew, keyed by seed: matrices N(0, std), vectors near 1 (gains)."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=gen, dtype=torch.float32) * std
            p.copy_(noise if p.dim() > 1 else 1 + noise)
    return model


def moved(model: nn.Module, seed: int, scale: float = 0.02) -> Any:
    """A copy of a model with noise of this standard deviation added to every parameter: an expert."""
    gen = torch.Generator().manual_seed(1000 + seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_((torch.randn(p.shape, generator=gen) * scale).to(p.dtype))
    return other


def checkpoint(
    folder: Path | str, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes: Any
) -> Path:
    """A tiny Llama and its tokenizer saved to `folder` as Hugging Face does. shard: largest file ("20KB")."""
    return save(llama(seed, dtype=dtype, **sizes), folder, shard)


def save(model: Any, folder: Path | str, shard: str = "5GB") -> Path:
    """A transformers model and the tiny tokenizer, written to `folder`."""
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def expert_of(base: Path | str | nn.Module, seed: int, folder: Path | str | None = None, scale: float = 0.02) -> Any:
    """`base` with noise added, of the same kind: a model gives a model, a folder gives a folder.

    The new folder is `folder`, or a sibling of the base's: base-expert1 for seed 1.
    """
    if isinstance(base, nn.Module):
        return moved(base, seed, scale)
    base = Path(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    return save(moved(model, seed, scale), folder or base.with_name(f"{base.name}-expert{seed}"))


@dataclass(frozen=True)
class TinyData:
    """A `flows.Data` in memory. Answers are scored by equality after stripping."""

    name: str
    train: Sequence[Item]
    test: Sequence[Item]
    scored: bool = False

    def score(self, item: Item, output: str) -> float:
        return float(output.strip() == (item.answer or "").strip())


@dataclass(frozen=True)
class TinySubject:
    """A `flows.Subject` around a model in memory."""

    name: str
    model: nn.Module
    tokenizer: Any

    @contextmanager
    def open(self) -> Iterator[tuple[nn.Module, Any]]:
        yield self.model, self.tokenizer


def subject(name: str = "tiny", model: nn.Module | None = None) -> TinySubject:
    return TinySubject(name, llama() if model is None else model, tokenizer())


def item(**content: Any) -> Item:
    """An Item whose id is the hash of its content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return Item(id=digest, **content)


def text_data(train: int = 24, test: int = 8, name: str = "text") -> TinyData:
    """Short plain sentences."""
    items = [item(text=f"{i} is the number before {i + 1}, and after {i - 1}.") for i in range(train + test)]
    return TinyData(name, items[:train], items[train:])


def task_data(train: int = 24, test: int = 8, name: str = "sums") -> TinyData:
    """One-line sums with a prompt and an answer."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    items = [item(prompt=f"{a} + {b} =", answer=str(a + b)) for a, b in pairs[: train + test]]
    return TinyData(name, items[:train], items[train:], scored=True)
