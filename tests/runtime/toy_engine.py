"""An engine over the toy model: a real scheduler, sampler and tokenizer, and answers that can be spelt out."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
from medusa_runtime.arguments import as_token_ids
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.options import experience_of
from medusa_runtime.engine import Engine
from medusa_runtime.sampling.sampler import Sampler
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import decoders, models

from .decoding import CHAIN
from .fake_backend import EOS, VOCAB, FakeBackend, logits_of, state_of

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"  # of the tokens 0 to 30; EOS is special


def toy_tokenizer():
    """A token is a character."""
    words = {letter: at for at, letter in enumerate(LETTERS)} | {"<end>": EOS}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return Tokenizer(tokenizer.to_str().encode(), "toy.json")


class ToyEncoder:
    """Prompts are token ids."""

    def __init__(self, tokenizer=None, vocab=VOCAB):
        self.tokenizer, self._vocab = tokenizer or toy_tokenizer(), vocab

    def encode(self, prompt, **options):
        assert not options
        return as_token_ids(prompt, self._vocab).tolist()


def toy_engine(backend=None, profile=CHAIN, is_tree_fixed=True, tokenizer=None, **arguments):
    backend = FakeBackend(hit_rate=0.8, spread=2) if backend is None else backend
    experience = experience_of(profile, (CHAIN,), backend, None)
    trees = {"chain": CHAIN}
    bundle = SimpleNamespace(
        root=Path("toy-bundle"),
        manifest=SimpleNamespace(profiles=tuple(trees)),
        model=backend.model,
        heads=backend.heads,
        profile=trees.__getitem__,
    )
    encoder = ToyEncoder(tokenizer, backend.model.vocab_size)
    loaded = SimpleNamespace(
        bundle=bundle,
        decoder=Decoder(backend, profile),
        prompt_encoder=encoder,
        tokenizer=encoder.tokenizer,
        experience=experience,
        is_tree_fixed=is_tree_fixed,
    )
    return Engine(loaded, **arguments)


class ToyRows:
    """The row of the toy model behind some tokens."""

    def __init__(self, tokens):
        self._logits = logits_of(state_of(tokens))

    def __call__(self, row):
        return self._logits

    def summary(self, row):
        return None


def plain_tokens(prompt, params, seed=None, choice=0, context=4096):
    """The tokens of an answer, drawn one at a time, without stop strings: (tokens, why they ended)."""
    ends = {EOS} if not params.ignore_eos else set()
    ends |= set(params.stop_token_ids)
    seed = params.seed if seed is None else seed
    sampler = Sampler(params, prompt, VOCAB, {EOS, *params.stop_token_ids}, (), seed, choice)
    tokens = list(prompt)
    limit = min(params.max_tokens or context, context - len(prompt))
    while len(tokens) - len(prompt) < limit:
        answer = tokens[len(prompt) :]
        tokens.append(sampler.choose(ToyRows(tokens), 0, answer))
        if tokens[-1] in ends:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


def text_of(tokens):
    return "".join(LETTERS[token] for token in tokens if token != EOS)


def random_params(rng, **fixed):
    """Parameters of a mixed load: greedy and drawn, with and without processors, filters and limits."""
    from medusa_runtime.sampling_params import SamplingParams

    chosen = {
        "max_tokens": int(rng.integers(1, 60)),
        "temperature": float(rng.choice([0, 0.7, 1.0, 1.5])),
        "seed": int(rng.integers(2**40)),
        "top_k": int(rng.choice([0, 0, 5])),
        "top_p": float(rng.choice([1, 1, 0.8])),
        "min_p": float(rng.choice([0, 0, 0.1])),
        "repetition_penalty": float(rng.choice([1, 1.3])),
        "presence_penalty": float(rng.choice([0, 0.4])),
        "frequency_penalty": float(rng.choice([0, -0.2])),
        "logit_bias": {3: 2.0, 7: -3.0} if rng.random() < 0.3 else None,
        "ignore_eos": bool(rng.random() < 0.5),
        "stop_token_ids": [5] if rng.random() < 0.3 else [],
    }
    chosen["min_tokens"] = int(rng.integers(0, chosen["max_tokens"])) if rng.random() < 0.3 else 0
    return SamplingParams(**(chosen | fixed))


def random_ids(rng):
    return rng.integers(VOCAB - 1, size=int(rng.integers(1, 12))).tolist()


def near(a, b, tolerance=1e-9):
    return bool(np.allclose(a, b, atol=tolerance))
