"""Loads what decoding needs from a bundle: a decoder on a backend, and the encoder of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medusa_profiles.profile import TreeProfile

from medusa_runtime.arguments import as_optional_text, as_path, as_text
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.controller import Experience
from medusa_runtime.drafting.options import experience_of
from medusa_runtime.heap import trim_heap
from medusa_runtime.profile_choice import choose_profile, exact_trees, find_calibration, find_profile
from medusa_runtime.prompt_encoder import PromptEncoder
from medusa_runtime.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A bundle that is ready to decode, one sequence at a time, in the calling thread.

    `Engine` serves requests with it; tools that measure or compare steps use it as it is.

    Attributes:
        bundle: The opened bundle.
        decoder: Runs its graph on a backend, with a tree.
        prompt_encoder: Turns prompts into token ids.
        experience: What is known of drafts before the first answer.
        is_tree_fixed: Whether the caller chose the decoder's tree.
    """

    bundle: Bundle
    decoder: Decoder
    prompt_encoder: PromptEncoder
    experience: Experience = field(default_factory=Experience.empty)
    is_tree_fixed: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        return self.prompt_encoder.tokenizer


def load_bundle(
    path: str | Path,
    *,
    backend: str = "ort-cpu",
    profile: str | TreeProfile | None = None,
    precision: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    gpu: int = 0,
    chat_template: str | None = None,
    expected_digest: str | None = None,
    calibration: str | Path | None = None,
    map_weights: bool = False,
) -> LoadedBundle:
    """Check a bundle and load it; arguments and errors are those of `medusa_runtime.engine.Engine.load`."""
    opened = Bundle.open(path, expected_digest=expected_digest)
    as_optional_text("chat_template", chat_template)
    file = None if calibration is None else as_path("calibration", calibration)
    graph = opened.graph(as_text("backend", backend), as_optional_text("precision", precision))[0]
    tree = profile if isinstance(profile, TreeProfile) else None
    if tree is not None:
        tree.check_fits(opened.heads.count, opened.heads.top_k)
    elif (name := as_optional_text("profile", profile)) is not None:
        tree = find_profile(opened, name)
    loaded = load_backend(opened, backend, precision, threads, max_length, gpu, map_weights)
    measured = find_calibration(opened, graph, loaded, file)
    decoder = Decoder(loaded, tree or choose_profile(opened, graph, measured))
    exact = exact_trees(loaded.precision, opened.profiles().values())
    experience = experience_of(decoder.profile, exact, loaded, measured)
    encoder = PromptEncoder(opened, chat_template)
    trim_heap()  # tokenizer and graph have freed more than they keep
    return LoadedBundle(opened, decoder, encoder, experience, is_tree_fixed=tree is not None)
