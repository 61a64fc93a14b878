"""The engine: generates text from prompts with a bundle, a backend and a tree."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from medusa_profiles.profile import TreeProfile

from medusa_runtime.accept import ACCEPT_RULES
from medusa_runtime.arguments import as_optional_text, as_path, as_text
from medusa_runtime.backends import Backend, load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import ArgumentError
from medusa_runtime.generation import Generation
from medusa_runtime.heap import trim_heap
from medusa_runtime.profile_choice import choose_profile, find_profile
from medusa_runtime.prompt_encoder import Prompt, PromptEncoder


class Engine:
    """Generates answers to prompts, one at a time.

    While one thread is generating, a call from another thread raises BusyError at once instead of waiting.

    Example::

        engine = Engine.load("bundle", backend="ort-cpu", profile="tree-8")
        text = engine.generate("Why is the sky blue?", max_new_tokens=40)
        for piece in engine.generate([{"role": "user", "content": "And the sea?"}], stream=True):
            print(piece, end="", flush=True)

    Attributes:
        bundle: The opened bundle.
        prompt_encoder: Turns prompts into token ids.
        tokenizer: The bundle's tokenizer.
        decoder: Runs the steps; use it to work with token ids or to change the tree.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        profile: TreeProfile,
        accept: str = "greedy",
        chat_template: str | None = None,
    ) -> None:
        """Combine an opened bundle, a loaded backend and a tree; most callers use `Engine.load`.

        Args:
            bundle: Provides tokenizer and chat template.
            backend: A loaded backend of the bundle.
            profile: The tree to verify in each step.
            accept: Acceptance rule, "greedy" or "typical".
            chat_template: Name of one of the model's chat templates; None is the bundle's default.

        Raises:
            ArgumentError: The acceptance rule is unknown.
            BundleError: Tokenizer or chat template are missing or damaged.
        """
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
        profile: str | TreeProfile | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        accept: str = "greedy",
        gpu: int = 0,
        chat_template: str | None = None,
        expected_digest: str | None = None,
        calibration: str | Path | None = None,
        map_weights: bool = False,
    ) -> Engine:
        """Check a bundle and load it.

        Args:
            bundle: Path of the bundle's folder.
            backend: "ort-cpu", "ort-cuda", "tensorrt" or "tensorrt-rtx".
            profile: Name of one of the bundle's trees, "plain" for plain decoding, or a tree of your own. None is the
                fastest of the bundle's trees on this machine if `medusa-export calibrate` has measured it with prompts,
                otherwise the default tree of the graph's backend and precision.
            precision: Precision of the graph; None is the only one there is, or fp32 among several.
            threads: CPU threads; None is one per physical core within the process's CPU quota.
            max_length: Maximum number of tokens of prompt and answer together, which bounds the memory; None is the
                model's context.
            accept: "greedy" produces the decoder's own tokens; "typical" is the paper's rule and LOSSY.
            gpu: Number of the GPU, from 0; ignored on a CPU.
            chat_template: Name of one of the model's chat templates; None is the one the bundle was built with.
            expected_digest: SHA-256 of the manifest that the bundle must have, as `medusa-export inspect` prints it;
                None accepts any bundle.
            calibration: File of `medusa-export calibrate` to use in place of the one in the user's cache, if `profile`
                is None. The cache's is ignored, with a warning of the logger `medusa_runtime`, if it is damaged or
                outdated; this one may have been measured on another machine.
            map_weights: Read the weights that ONNX Runtime does not repack from the mapped files instead of from a
                copy: less memory, which processes share, but the files must not be written to while the engine lives,
                since that would change its answers. Ignored on a GPU.

        Raises:
            BundleError: The bundle is missing or damaged, or lacks the backend, precision, profile or template.
            CalibrationError: `calibration` is missing or damaged, or belongs to another bundle or graph.
            ProfileError: `profile` is a tree that needs more heads or candidates than the bundle has.
            MissingExtraError: The backend's library is not installed; the message has the pip command.
            CapacityError: Memory does not suffice.
            ArgumentError: An argument has a wrong type or is out of range.
            MedusaError: The GPU does not exist.
        """
        opened = Bundle.open(bundle, expected_digest=expected_digest)
        as_optional_text("chat_template", chat_template)
        file = None if calibration is None else as_path("calibration", calibration)
        graph = opened.graph(as_text("backend", backend), as_optional_text("precision", precision))[0]
        tree = profile if isinstance(profile, TreeProfile) else None
        if tree is not None:
            tree.check_fits(opened.heads.count, opened.heads.top_k)
        elif (name := as_optional_text("profile", profile)) is not None:
            tree = find_profile(opened, name)
        loaded = load_backend(opened, backend, precision, threads, max_length, gpu, map_weights)
        engine = cls(opened, loaded, tree or choose_profile(opened, graph, loaded, file), accept, chat_template)
        trim_heap()  # tokenizer and graph have freed more than they keep
        return engine

    def warm_up(self) -> None:
        """Prepare for prompts and answers of every length, so that no request waits (`Decoder.warm_up`)."""
        self.decoder.warm_up()

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Render a prompt with the chat template and return its token ids.

        Args:
            prompt: One user message, or a list of messages with "role" and "content".
            raw: Tokenise a text as it is, without the chat template but with the tokenizer's own special tokens.

        Raises:
            PromptError: The prompt is empty, has a wrong type, or the template rejects it.
            CapacityError: The prompt has more characters than the model's context can hold.
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
        """Generate the answer to a prompt.

        The answer ends at one of the model's end tokens, after `max_new_tokens`, or where the context is full.

        Args:
            prompt: One user message, or a list of messages with "role" and "content".
            stream: Return an iterator over pieces of text instead of the whole text.
            max_new_tokens: Maximum number of tokens of the answer.
            raw: Use a text as it is, without the chat template.

        Returns:
            The whole text, or with `stream` a `Generation`.

        Raises:
            PromptError: The prompt is empty, has a wrong type, or the template rejects it.
            CapacityError: The prompt does not fit the model's context.
            BusyError: Another thread is generating or has an unfinished stream.
        """
        generation = Generation(self.decoder, self.tokenizer, self.encode(prompt, raw=raw), max_new_tokens)
        if stream:
            return generation
        with generation:
            return "".join(generation)
