"""The engine: answers any number of requests from any number of threads with one bundle, backend and scheduler."""

from __future__ import annotations

import itertools
import math
import secrets
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from medusa_profiles.profile import TreeProfile, shown

from medusa_runtime.answer_rule import answer_rule
from medusa_runtime.arguments import as_bool, as_int, as_optional_int, as_token_ids
from medusa_runtime.errors import ArgumentError
from medusa_runtime.facts import PLAIN
from medusa_runtime.handle import RequestHandle
from medusa_runtime.loading import LoadedBundle, load_bundle
from medusa_runtime.parameter_checks import as_number, as_seconds
from medusa_runtime.prefix_reuse import PrefixReuse, default_budget
from medusa_runtime.profile_choice import find_profile
from medusa_runtime.prompt_encoder import Prompt, is_token_ids
from medusa_runtime.prompt_options import PromptOptions
from medusa_runtime.prompt_truncation import check_room, truncate_prompt
from medusa_runtime.request import Request
from medusa_runtime.request_runner import RequestRunner
from medusa_runtime.results import GenerationResult
from medusa_runtime.sampling.bad_words import bad_word_ids
from medusa_runtime.sampling_params import AUTO, HEADS, SamplingParams
from medusa_runtime.scheduler import Call, Scheduler
from medusa_runtime.stats import Stats, StatsCollector
from medusa_runtime.structured.compiler import GrammarCompiler
from medusa_runtime.structured.outputs import StructuredOutputs

MAX_WAITING = 256  # requests in the queue, unless the caller chooses


class Engine:
    """Answers requests. One thread of its own does all work on the backend; callers submit requests and read answers.

    Requests are answered one after the other, in order of arrival. All methods may be called from any thread. An engine
    belongs to the process that loaded it: in a forked child requests, their handles and `stats` raise
    ForkedProcessError.

    Example::

        with Engine.load("bundle", profile="tree-8") as engine:
            print(engine.generate("Why is the sky blue?", SamplingParams(max_tokens=40)).text)
            for chunk in engine.submit([{"role": "user", "content": "And the sea?"}]):
                print(chunk.text, end="", flush=True)

    Attributes:
        bundle: The opened bundle.
        prompt_encoder: Turns prompts into token ids.
        tokenizer: The bundle's tokenizer.
        profile: The tree of requests that name none.
        context: Maximum number of tokens of prompt and answer together.
    """

    def __init__(
        self, loaded: LoadedBundle, *, max_waiting: int = MAX_WAITING, prefix_cache_bytes: int | None = None
    ) -> None:
        """Create an engine of a loaded bundle; most callers use `Engine.load`.

        Args:
            loaded: The loaded bundle, which must not be used by anything else from now on.
            max_waiting: Maximum number of requests that wait.
            prefix_cache_bytes: Bytes for rows of earlier requests, as in `load`.

        Raises:
            ArgumentError: `max_waiting` or `prefix_cache_bytes` has a wrong type or is out of range.
        """
        prefix_bytes = as_optional_int("prefix_cache_bytes", prefix_cache_bytes, 0)
        self.bundle, self.prompt_encoder, self.tokenizer = loaded.bundle, loaded.prompt_encoder, loaded.tokenizer
        self._decoder = decoder = loaded.decoder
        budget = default_budget(decoder.backend) if prefix_bytes is None else prefix_bytes
        decoder.reuse = PrefixReuse(decoder.cache, budget)
        self.profile, self.context = decoder.profile, decoder.cache.context
        self._stats = StatsCollector()
        self._runner = RequestRunner(self._decoder, self.tokenizer, self._stats, loaded.experience)
        self._experience = loaded.experience
        self._draft = HEADS if loaded.is_tree_fixed else AUTO
        self._scheduler = Scheduler(as_int("max_waiting", max_waiting, 1))
        self._numbers = itertools.count(1)
        self._grammars = GrammarCompiler(self.tokenizer, self.bundle.model)
        self._trees: dict[str, TreeProfile] = {}
        weakref.finalize(self, Scheduler.abort_without_waiting, self._scheduler)

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
        gpu: int = 0,
        chat_template: str | None = None,
        expected_digest: str | None = None,
        calibration: str | Path | None = None,
        map_weights: bool = False,
        max_waiting: int = MAX_WAITING,
        prefix_cache_bytes: int | None = None,
    ) -> Engine:
        """Check a bundle and load it.

        Args:
            bundle: Path of the bundle's folder.
            backend: "ort-cpu", "ort-cuda", "tensorrt" or "tensorrt-rtx".
            profile: Name of one of the bundle's trees, "plain" for plain decoding, or a tree of your own, which steps
                then verify unless a request asks for something else. None lets each step verify what is expected to be
                the fastest (`SamplingParams.draft`), by what `medusa-export calibrate` has measured on this machine,
                otherwise by the steps that are run.
            precision: Precision of the graph; None is the only one there is, or fp32 among several.
            threads: CPU threads; None is one per physical core within the process's CPU quota.
            max_length: Maximum number of tokens of prompt and answer together, which bounds the memory; None is the
                model's context.
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
            max_waiting: Maximum number of requests that wait; more raise QueueFullError.
            prefix_cache_bytes: Bytes for keys and values of earlier requests, which prompts that begin in the same way
                use instead of computing them again: host memory on a CPU, device memory on a GPU. 0 computes every
                prompt whole. None is, in fp32, 256 MiB on a CPU, and on a GPU 1 GiB or a quarter of the free memory if
                that is less; in other precisions it is 0, as an answer may then depend on what was answered before.

        Raises:
            BundleError: The bundle is missing or damaged, or lacks the backend, precision, profile or template.
            CalibrationError: `calibration` is missing or damaged, or belongs to another bundle or graph.
            ProfileError: `profile` is a tree that needs more heads or candidates than the bundle has.
            MissingExtraError: The backend's library is not installed; the message has the pip command.
            CapacityError: Memory does not suffice.
            ArgumentError: An argument has a wrong type or is out of range.
            MedusaError: The GPU does not exist.
        """
        as_int("max_waiting", max_waiting, 1)
        as_optional_int("prefix_cache_bytes", prefix_cache_bytes, 0)
        loaded = load_bundle(
            bundle,
            backend=backend,
            profile=profile,
            precision=precision,
            threads=threads,
            max_length=max_length,
            gpu=gpu,
            chat_template=chat_template,
            expected_digest=expected_digest,
            calibration=calibration,
            map_weights=map_weights,
        )
        return cls(loaded, max_waiting=max_waiting, prefix_cache_bytes=prefix_cache_bytes)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Answer a prompt and return the whole result; arguments and errors are those of `submit`, and of its handle.

        An interrupt while waiting cancels the request.
        """
        with self.submit(prompt, params, timeout=timeout, **options) as handle:
            return handle.result()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> RequestHandle:
        """Queue a request and return at once.

        Args:
            prompt: A text (one user message), messages, or token ids.
            params: The parameters; None is `SamplingParams()`: greedy, at most 256 tokens.
            timeout: Seconds from now after which the request ends with DeadlineError; None has no limit.
            options: How the prompt is encoded, as in `PromptEncoder.encode`.

        Raises:
            PromptError: The prompt is empty, has a wrong type, or the template rejects it.
            CapacityError: The prompt does not fit the context.
            ArgumentError: A parameter has a wrong type or does not fit the model, the bundle has no such tree, or
                `structured_outputs` cannot be compiled.
            MissingExtraError: `structured_outputs` is used, and llguidance is not installed.
            BundleError: The tree's file is damaged.
            ProfileError: The tree needs more heads or candidates than the bundle has.
            QueueFullError: `max_waiting` requests wait.
            EngineClosedError: The engine was closed.
            ForkedProcessError: This is a child of the process that loaded the engine.
        """
        submitted = time.perf_counter()
        self._scheduler.check_process()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ArgumentError(f"params is {shown(params)}, of type {type(params).__name__}; expected SamplingParams")
        seconds = as_seconds("timeout", timeout)
        vocabulary = self.bundle.model.vocab_size
        params.check_vocabulary(vocabulary)
        tree = self._tree(params.profile)
        if params.truncate_prompt_tokens is not None and is_token_ids(prompt):
            # there may be more token ids than the encoder accepts, and those that are cut off must be valid, too
            prompt = truncate_prompt(as_token_ids(prompt, vocabulary), params, self.context)
        ids = truncate_prompt(self.encode(prompt, **options), params, self.context)
        check_room(ids, params, self.context)
        outputs = StructuredOutputs.of_optional(params.structured_outputs)
        request = Request(
            number=next(self._numbers),
            prompt=tuple(ids),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            tree=tree,
            draft=params.draft or (HEADS if params.profile is not None or params.is_typical else self._draft),
            bad_words=bad_word_ids(params.bad_words, self.tokenizer),
            deadline=None if seconds is None else time.monotonic() + seconds,
            submitted=submitted,
            worker=self._runner,
            grammar=None if outputs is None else self._grammars.compile(outputs),
        )
        answer_rule(request, 0, self.bundle.model, ())  # raises what is wrong with the parameters together
        self._scheduler.submit(request)
        return RequestHandle(request, self._scheduler, self)

    def encode(self, prompt: Prompt, **options: Any) -> list[int]:
        """Return a prompt's token ids; arguments and errors are those of `PromptEncoder.encode`."""
        for name in options:
            if name not in PromptOptions.__annotations__:
                expected = ", ".join(PromptOptions.__annotations__)
                raise ArgumentError(
                    f"unknown option {shown(name)}; expected some of {expected}: limits and sampling are fields of "
                    "SamplingParams, and Engine.submit streams"
                )
        return self.prompt_encoder.encode(prompt, **options)

    def warm_up(self) -> None:
        """Prepare for prompts and answers of every length, so that no request waits (`Decoder.warm_up`).

        Raises:
            QueueFullError: As `submit` does.
            EngineClosedError: The engine was closed.
            ForkedProcessError: This is a child of the process that loaded the engine.
        """
        choices = self._experience.options.choices() if self._draft == AUTO else []
        call = Call(lambda checkpoint: self._decoder.warm_up(checkpoint, choices))
        self._scheduler.submit(call)
        call.wait()

    def stats(self) -> Stats:
        """Return the counters since the engine was loaded. Raises ForkedProcessError in a child process."""
        self._scheduler.check_process()
        cache = self._decoder.cache
        return self._stats.snapshot(
            waiting=self._scheduler.waiting,
            running=self._scheduler.running,
            kv_rows=cache.length(),
            kv_capacity=cache.capacity,
        )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests and end the engine's thread; it may be called more than once.

        Args:
            drain: Answer all requests that were submitted; otherwise they end with EngineClosedError.
            timeout: Seconds to wait at most; None waits as long as it takes.
        """
        seconds = None if timeout is None else as_number("timeout", timeout, 0, math.inf)
        self._scheduler.close(drain=as_bool("drain", drain), timeout=seconds)

    def __repr__(self) -> str:
        """Return the name of the bundle's folder, the backend, the precision and the tree."""
        backend = self._decoder.backend
        return f"<Engine {self.bundle.root.resolve().name}, {backend.name}, {backend.precision}, {self.profile.name}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _tree(self, profile: str | TreeProfile | None) -> TreeProfile:
        if profile is None:
            return self.profile
        if isinstance(profile, TreeProfile):
            profile.check_fits(self.bundle.heads.count, self.bundle.heads.top_k)
            return profile
        if profile not in self._trees:
            names = self.bundle.manifest.profiles
            if profile != PLAIN and not self.bundle.heads.count:
                raise ArgumentError(
                    f"profile is {shown(profile)}; expected plain, as this bundle has no heads: leave the profile out, "
                    "or build with --heads"
                )
            if profile != PLAIN and profile not in names:
                raise ArgumentError(
                    f"profile is {shown(profile)}; expected one of the bundle's trees, {', '.join((*names, PLAIN))}: "
                    "pass one of these names, or a TreeProfile"
                )
            self._trees[profile] = find_profile(self.bundle, profile)
        return self._trees[profile]
