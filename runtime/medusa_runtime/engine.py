"""Text in, text out: a bundle, a backend and a tree behind one `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from medusa_profiles.profile import TreeProfile

from medusa_runtime.accept import ACCEPT_RULES
from medusa_runtime.arguments import as_optional_text, as_text
from medusa_runtime.backends import Backend, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import PLAIN
from medusa_runtime.generation import Generation
from medusa_runtime.prompt_encoder import Prompt, PromptEncoder


class Engine:
    """Answers prompts with a bundle, one at a time; a second thread that asks meanwhile gets BusyError at once.

    engine = Engine.load("bundle", backend="ort-cpu", profile="tree-8")
    for piece in engine.generate("Why is the sky blue?", stream=True): print(piece, end="")
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        profile: TreeProfile,
        accept: str = "greedy",
        chat_template: str | None = None,
    ) -> None:
        """Put a bundle's tokenizer, a loaded backend and a tree together; most callers want `Engine.load`."""
        if not isinstance(accept, str) or accept not in ACCEPT_RULES:
            raise ArgumentError(f"unknown accept rule {accept!r}; expected one of {', '.join(ACCEPT_RULES)}")
        self.bundle = bundle
        self.prompt_encoder = PromptEncoder(bundle, chat_template)
        self.tokenizer = self.prompt_encoder.tokenizer
        self.decoder = Decoder(backend, profile, ACCEPT_RULES[accept])

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "ort-cpu",
        profile: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        accept: str = "greedy",
        gpu: int = 0,
        chat_template: str | None = None,
        expected_digest: str | None = None,
    ) -> Engine:
        """Check and load a bundle.

        profile: one of the bundle's trees, "plain" for plain decoding, None for the one that suits the precision.
        precision: None for the only one, or fp32. threads: None means `threads.default_threads`. max_length: tokens
        that prompt and answer may come to, which bounds the memory taken; None for the model's context. accept:
        "greedy" gives the decoder's own tokens; "typical" is the paper's rule and LOSSY. gpu: the number of the GPU,
        from 0; it means nothing to a CPU. chat_template: the name of one of the model's own templates, None for the one
        that the bundle was built with. expected_digest: pins the bundle to its manifest's digest, as `medusa-export
        inspect` shows it; None takes any. Raises BundleError, MissingExtraError, CapacityError, ArgumentError.
        """
        opened = Bundle.open(bundle, expected_digest=expected_digest)
        as_optional_text("profile", profile)
        as_optional_text("chat_template", chat_template)
        name = opened.graph(as_text("backend", backend), as_optional_text("precision", precision))[0].profile
        tree = opened_profile(opened, name if profile is None else profile)
        loaded = load_backend(opened, backend, precision, threads, max_length, gpu)
        return cls(opened, loaded, tree, accept, chat_template)

    def warm_up(self) -> None:
        """Make ready for prompts and answers of all lengths (`Decoder.warm_up`): for a service, before the first."""
        self.decoder.warm_up()

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Lay a prompt out by the chat template and turn it into token ids.

        `raw` takes a text as it stands, with the special tokens that the tokenizer itself adds. Raises PromptError
        for an empty prompt.
        """
        return self.prompt_encoder.encode(prompt, raw=raw)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, max_new_tokens: int = 256, raw: bool = False
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], max_new_tokens: int = 256, raw: bool = False
    ) -> Generation: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, max_new_tokens: int = 256, raw: bool = False
    ) -> str | Generation:
        """Answer a prompt: the whole text, or with `stream` a `Generation` to iterate over.

        The answer ends with one of the model's end tokens or after `max_new_tokens`. Raises PromptError,
        CapacityError, or BusyError while another thread is asking or has an unfinished stream.
        """
        generation = Generation(self.decoder, self.tokenizer, self.encode(prompt, raw=raw), max_new_tokens)
        if stream:
            return generation
        with generation:
            return "".join(generation)


def opened_profile(bundle: Bundle, name: str) -> TreeProfile:
    """Return a bundle's tree by name; "plain" is always there. Raises BundleError with the list of what there is."""
    return TreeProfile.plain() if name == PLAIN else bundle.profile(name)
