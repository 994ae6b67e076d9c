"""A tokenizer trained on the user's own text, for models from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier.errors import LuthierError

PAD, EOS = "<|pad|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], size: int, *, max_length: int = 1_000_000) -> Any:
    """Byte-level BPE with `size` tokens at most, as a transformers fast tokenizer.

    It reads any text without loss: every byte is a token. Token 0 pads, token 1 ends a document. The same
    texts in the same order give the same tokenizer.  LuthierError if `size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 258:
        raise LuthierError(f"a vocabulary of {size} has no room for 256 bytes and two marks", do="ask for 258 or more")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
