"""Generates the answers of one request after the other with a decoder, and reports what each step added."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from medusa_runtime.answer_rule import answer_rule, end_ids, stop_ids
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.controller import Experience
from medusa_runtime.drafting.drafter import Drafter
from medusa_runtime.errors import DeadlineError, EngineClosedError, RequestCancelledError, RequestError
from medusa_runtime.log import LOGGER
from medusa_runtime.request import Checkpoint, Request
from medusa_runtime.results import Choice, Chunk, GenerationResult, Times, TokenLogprobs
from medusa_runtime.sampling.logprobs import token_logprobs
from medusa_runtime.sampling_params import HEADS, LOSSLESS, TYPICAL
from medusa_runtime.sequence import SequenceState
from medusa_runtime.stats import DepthCounts, StatsCollector
from medusa_runtime.text_stream import TextStream
from medusa_runtime.tokenizer import Tokenizer


@dataclass
class _Answer:
    """One answer while it grows."""

    index: int
    sequence: SequenceState
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    steps: int = 0
    seconds: float = 0.0
    depths: DepthCounts = field(default_factory=DepthCounts)

    def to_choice(self) -> Choice:
        return Choice(
            index=self.index,
            text=self.text.text,
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            steps=self.steps,
            accepted_by_depth=tuple(self.depths.accepted),
            drafted_by_depth=tuple(self.depths.drafted),
            decode_seconds=self.seconds,
        )


NO_ANSWER = Choice(
    index=0,
    text="",
    token_ids=(),
    finish_reason=None,
    stop_reason=None,
    logprobs=None,
    steps=0,
    accepted_by_depth=(),
    drafted_by_depth=(),
    decode_seconds=0.0,
)


class RequestRunner:
    """Runs requests on a decoder; see `medusa_runtime.request.RequestWorker`.

    Args:
        decoder: The decoder, which nothing else uses.
        tokenizer: Turns tokens into text.
        stats: Where steps and requests are counted.
        experience: What is known of drafts.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, stats: StatsCollector, experience: Experience) -> None:
        self._decoder, self._tokenizer, self._stats, self._experience = decoder, tokenizer, stats, experience

    def answer(self, request: Request, checkpoint: Checkpoint) -> None:
        """Generate all answers of a request and put them into its mailbox.

        What ends it early, of whatever kind, is reported to the request; the next request starts anew.
        """
        run = None
        LOGGER.debug("request %d: %d tokens of prompt", request.number, len(request.prompt))
        try:
            run = self._run(request)
            checkpoint()
            run.generate(checkpoint)
            request.mailbox.finish(run.result(), partial(self._stats.add, finished=1, queue_seconds=run.queue_seconds))
        except BaseException as error:
            self._fail(request, error, run)
            if not isinstance(error, Exception):
                raise
        finally:
            self._decoder.abort()

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request that was not begun with an error."""
        self._fail(request, error, None)

    def _run(self, request: Request) -> _Run:
        return _Run(request, self._decoder, self._tokenizer, self._stats, self._experience)

    def _fail(self, request: Request, error: BaseException, run: _Run | None) -> None:
        """End a request with an error, and with what was generated before; the first end counts."""
        if isinstance(error, RequestError):
            run = run or self._run(request)
            error.result = run.result()
        is_expected = isinstance(error, (RequestCancelledError, DeadlineError, EngineClosedError))
        if not (is_expected or request.mailbox.is_done):
            LOGGER.warning("request %d ended with %s", request.number, type(error).__name__)
        queue_seconds = perf_counter() - request.submitted if run is None else run.queue_seconds
        amounts = {"cancelled" if is_expected else "failed": 1, "queue_seconds": queue_seconds}
        request.mailbox.fail(error, partial(self._stats.add, **amounts))


class _Run:
    """One request at work."""

    def __init__(
        self,
        request: Request,
        decoder: Decoder,
        tokenizer: Tokenizer,
        stats: StatsCollector,
        experience: Experience,
    ) -> None:
        self._request, self._decoder, self._tokenizer, self._stats = request, decoder, tokenizer, stats
        self._experience = experience.of(request.draft)
        self._answers: list[_Answer] = []
        self._started = perf_counter()
        self.queue_seconds = self._started - request.submitted
        self._prefill_seconds, self._reused = 0.0, 0
        self._end_ids = end_ids(request.params, decoder.backend.model)

    def generate(self, checkpoint: Checkpoint) -> None:
        """Generate the answers, one after the other; their prompt is computed once."""
        request, decoder = self._request, self._decoder
        decoder.set_profile(request.tree)
        for index in range(request.params.n):
            answer = self._new_answer(index)
            if index == 0:
                decoder.begin(answer.sequence, checkpoint, keep_prompt=request.params.n > 1)
                self._prefill_seconds = perf_counter() - self._started
                self._reused = answer.sequence.reused
                self._stats.add(
                    prompt_tokens=len(request.prompt),
                    reused_tokens=self._reused,
                    prefill_seconds=self._prefill_seconds,
                )
            else:
                decoder.begin_again(answer.sequence)
            self._answers.append(answer)
            self._add(answer, list(answer.sequence.answer))
            while answer.finish_reason is None:
                checkpoint()
                self._step(answer)

    def result(self) -> GenerationResult:
        """Return what was generated so far."""
        request, now = self._request, perf_counter()
        choices = tuple(answer.to_choice() for answer in self._answers) or (NO_ANSWER,)
        return GenerationResult(
            prompt_token_ids=request.prompt,
            choices=choices,
            seed=request.seed,
            profile=request.tree.name if request.draft == HEADS else request.draft,
            acceptance=TYPICAL if request.params.is_typical else LOSSLESS,
            times=Times(
                queue=self.queue_seconds,
                prefill=self._prefill_seconds,
                decode=sum(choice.decode_seconds for choice in choices),
                total=now - request.submitted,
            ),
            cached_tokens=self._reused,
        )

    def _new_answer(self, index: int) -> _Answer:
        request, params, model = self._request, self._request.params, self._decoder.backend.model
        limit = model.context if params.max_tokens is None else params.max_tokens
        sequence = SequenceState(request.prompt, limit, stop_ids(params, model), self._decoder.cache.context)
        grammar = None if request.grammar is None else request.grammar.begin()
        sequence.rule = answer_rule(request, index, model, sequence.answer, grammar)
        sequence.drafter = None if self._experience is None else Drafter(self._experience, grammar)
        # Summaries of all rows cost a device time, and processors need whole rows: those that are visited are read.
        can_suffice = not params.has_processors and (params.has_filters or params.logprobs is not None)
        sequence.summaries = can_suffice and not self._decoder.backend.logits_on_host
        text = TextStream(
            self._tokenizer,
            tuple(params.stop),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        return _Answer(index, sequence, text, logprobs=None if params.logprobs is None else [])

    def _step(self, answer: _Answer) -> None:
        decoder, room = self._decoder, answer.sequence.room
        started = perf_counter()
        tokens = decoder.step(answer.sequence)
        seconds = perf_counter() - started
        answer.steps += 1
        answer.seconds += seconds
        kept = self._add(answer, tokens)
        # Candidates beyond the answer's end, which plain decoding would not have reached either, were not drafted.
        depth = min(decoder.last_tree.depth, kept if answer.finish_reason == "stop" else room)
        accepted = min(decoder.last_accepted, kept)
        answer.depths.add(accepted, depth)
        self._stats.add_step(seconds, kept, accepted, decoder.last_tree, depth)

    def _add(self, answer: _Answer, tokens: list[int]) -> int:
        """Add the tokens of a step to an answer: find where it ends, report a chunk, and return how many are kept."""
        params, decoder = self._request.params, self._decoder
        reason = answer.sequence.finish_reason
        if match := answer.text.push(tokens, ends_with_stop_token=reason == "stop"):
            tokens = tokens[: match.tokens]
            answer.finish_reason, answer.stop_reason = "stop", match.string
        elif reason is not None:
            answer.finish_reason = reason
            if reason == "stop" and tokens[-1] not in self._end_ids:
                answer.stop_reason = tokens[-1]
            answer.text.finish()
        answer.tokens += tokens
        self._stats.add(completion_tokens=len(tokens))
        logprobs = None
        if answer.logprobs is not None and params.logprobs is not None:
            logprobs = tuple(
                token_logprobs(decoder.rows, row, token, params.logprobs)
                for row, token in zip(decoder.last_path, tokens, strict=False)
            )
            answer.logprobs += logprobs
        self._request.mailbox.put(
            Chunk(answer.index, answer.text.take(), tuple(tokens), logprobs, answer.finish_reason, answer.stop_reason)
        )
        return len(tokens)
