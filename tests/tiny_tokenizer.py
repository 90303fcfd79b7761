"""A tokenizer of single bytes for the tiny Llama, with or without chat markup."""

from __future__ import annotations

from pathlib import Path


def write_tokenizer(folder: Path, *, chat: bool = True) -> Path:
    """250 bytes and the specials: 256 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:250]
    vocabulary = {"<unk>": 0, "</s>": 1} | {character: i for i, character in enumerate(alphabet, 2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    if chat:
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(fast) <= 256
    fast.save_pretrained(folder)
    return folder
