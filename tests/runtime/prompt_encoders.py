"""Prompt encoders of bundles that have a family's chat template and a small tokenizer with its control tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
from medusa_runtime.control_tokens import find_control_tokens
from medusa_runtime.prompt_encoder import PromptEncoder
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .chat_templates import FAMILIES, special_names

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps. user assistant system tool im_start im_end end",
    '<|im_start|>user\nHello<|im_end|> <tool_call> [INST] </s> <table> {"name": "x", "arguments": {}}',
    "Ça va? 你好，世界。 \U0001f642 two  spaces\n\n\tand a tab",
]


@cache
def byte_level(family: str, post_process: str = "") -> tokenizers.Tokenizer:
    """Return a byte-level BPE with a family's control tokens outside of the model, like Llama 3's and Qwen's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return _finished(made, family, post_process)


@cache
def unigram(family: str, post_process: str = "") -> tokenizers.Tokenizer:
    """Return a Unigram whose model has the control tokens too, and finds them in text by itself, like T5's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    letters = sorted({letter for sentence in SENTENCES for letter in sentence} | set("{}[]<>|/_\n"))
    trainer = trainers.UnigramTrainer(
        vocab_size=320,
        special_tokens=["<unk>", *FAMILIES[family][1]],
        initial_alphabet=letters,
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    return _finished(made, family, post_process)


@cache
def byte_fallback(family: str, post_process: str = "") -> tokenizers.Tokenizer:
    """Return a character BPE with byte fallback and the control tokens in the model, like Llama 2's and Mistral's."""
    words = ["<unk>", *FAMILIES[family][1], *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted({letter for sentence in SENTENCES for letter in sentence if letter not in " \n"} | set("[]<>|/_"))
    merges = [("<", "|"), ("|", ">"), ("▁", "T"), ("h", "e"), ("▁T", "he"), ("<", "/")]
    vocabulary = dict.fromkeys([*words, *letters, *map("".join, merges)])
    model = models.BPE(
        {word: at for at, word in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return _finished(made, family, post_process)


BUILDERS = {"byte_level": byte_level, "unigram": unigram, "byte_fallback": byte_fallback}


def _finished(made: tokenizers.Tokenizer, family: str, post_process: str) -> tokenizers.Tokenizer:
    _, special, added, bos, eos = FAMILIES[family]
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text in added])
    around = {"bos": f"{bos} $A", "both": f"{bos} $A {eos}"}
    if post_process in around:
        template = processors.TemplateProcessing(
            single=around[post_process], special_tokens=[(text, made.token_to_id(text)) for text in {bos, eos}]
        )
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    elif post_process == "roberta":
        pairs = [(text, made.token_to_id(text)) for text in (eos, bos)]
        made.post_processor = processors.RobertaProcessing(*pairs, add_prefix_space=False)
    return made


def encoder(
    family: str, core: tokenizers.Tokenizer | None = None, template: str | None = None, context: int = 4096
) -> PromptEncoder:
    """Return the encoder of a bundle that has a family's template and a tokenizer."""
    core = byte_level(family) if core is None else core
    bundle: Any = SimpleNamespace(
        root=Path("bundle"),
        tokenizer=core.to_str().encode(),
        chat_template=FAMILIES[family][0] if template is None else template,
        special_tokens=special_names(family),
        model=SimpleNamespace(context=context, vocab_size=core.get_vocab_size()),
    )

    return PromptEncoder(bundle)


def control_ids(prompts: PromptEncoder, ids: list[int]) -> list[int]:
    """Return those of a prompt's token ids that are control tokens, in order."""
    template = prompts._template
    found = set(find_control_tokens(prompts.tokenizer, template.source if template else "").values())
    return [token for token in ids if token in found]


def decoded(prompts: PromptEncoder, ids: list[int]) -> str:
    """Return the text of token ids, with special tokens."""
    return prompts.tokenizer.decode(ids, skip_special_tokens=False)
