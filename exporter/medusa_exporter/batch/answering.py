"""Answers a file of requests in OpenAI's batch format with an engine, and resumes a run that was interrupted."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BundleError, EngineClosedError, MedusaError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.openai_format import (
    OpenAIRequest,
    ResponseFacts,
    TokenTexts,
    error_body,
    read_request,
    response_body,
    status_of,
)
from medusa_runtime.sampling_params import SamplingParams

from medusa_exporter.batch.identity import BatchIdentity, seed_of
from medusa_exporter.batch.requests_file import (
    BatchError,
    BatchFacts,
    BatchRequest,
    check_requests,
    digest_of,
    read_requests,
)
from medusa_exporter.batch.responses_file import Finished, ResponsesFile, count_finished, encode_line
from medusa_exporter.console import Bar, Progress, note

QUEUED = 8  # requests that the engine has at a time, so that prompts are encoded while answers are generated
MAX_FAILURES = 8  # requests in a row that may fail, before the engine and not the requests is at fault
FINGERPRINT = 16  # hexadecimal digits of the bundle's digest in `system_fingerprint`


@dataclass(frozen=True)
class BatchPlan:
    """What a batch is: which requests are answered, with what, and to where.

    Attributes:
        file: The file of requests.
        output: The file of responses.
        params: Sampling parameters of fields that a body leaves out.
        chat_template_arguments: Names for the chat template that a body does not set.
        sanitize: Whether control tokens in texts are encoded as ordinary text.
        settings: What else the responses depend on, JSON values: backend, precision, chat template and so on.
    """

    file: Path
    output: Path
    params: SamplingParams
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)
    sanitize: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, bundle: Bundle) -> BatchIdentity:
        """Return what the responses depend on."""
        parameters = dataclasses.asdict(self.params)
        settings = {
            "parameters": parameters,
            "chat_template_arguments": dict(self.chat_template_arguments),
            "sanitize": self.sanitize,
            **self.settings,
        }
        return BatchIdentity(bundle.manifest.digest, settings)


@dataclass(frozen=True)
class BatchSummary:
    """What a run has done.

    Attributes:
        statuses: Number of responses in the output by their status code.
        resumed: Number of these that an earlier run has written.
        prompt_tokens: Tokens of the prompts that this run computed.
        completion_tokens: Tokens that this run generated.
        tokens_per_step: Mean tokens per step of this run.
        seconds: Duration of the answers of this run.
    """

    statuses: Counter[int]
    resumed: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_step: float = 0.0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        """Number of requests."""
        return self.statuses.total()


def answer_batch(plan: BatchPlan, bundle: Bundle, load: Callable[[], Engine], *, force: bool = False) -> BatchSummary:
    """Answer all requests of a file.

    A run that was interrupted is resumed behind its last response; nothing is done if the output is complete.

    Args:
        plan: The batch.
        bundle: The opened bundle.
        load: Loads the engine; called after all files were checked, if anything is left to do.
        force: Answer all requests anew; a complete output stays until the new one replaces it.

    Raises:
        BatchError: The file of requests is invalid, or the output belongs to something else.
        BundleError: The bundle has no chat template, and there are chats to answer.
        BusyError: Another command is writing to the output.
        OverwriteError: No batch has written what is at the output's place.
        MedusaError: The engine failed.
    """
    output, identity = ResponsesFile.at(plan.output), plan.identity(bundle)
    facts = check_requests(plan.file)
    if facts.first_chat_line is not None and bundle.chat_template is None:
        raise BundleError(
            f"{bundle.root} has no chat template, which {plan.file}:{facts.first_chat_line} needs; expected requests "
            "for /v1/completions only, or build the bundle with --chat-template"
        )
    if not force and (done := output.is_up_to_date(read_requests(plan.file), identity)):
        note(f"{plan.output} is up to date, {done.count} responses; --force answers all requests anew")
        return BatchSummary(done.statuses, done.count)
    with output.open_part() as file:
        finished = Finished() if force else _count(output, plan, identity)
        file.truncate(finished.size)
        file.seek(finished.size)
        summary = BatchSummary(finished.statuses, finished.count)
        if finished.count < facts.requests:
            with load() as engine:
                summary = _Run(plan, identity, engine, file).answer(finished, facts)
        output.publish(file)
    return summary


def _count(output: ResponsesFile, plan: BatchPlan, identity: BatchIdentity) -> Finished:
    finished = count_finished(output.part, output.part, read_requests(plan.file), identity)
    if finished.count:
        note(f"resuming behind {finished.count} responses in {output.part}")
    return finished


@dataclass(frozen=True)
class _Pending:
    """A request that was submitted, or the error that it was refused with."""

    request: BatchRequest
    request_id: str
    read: OpenAIRequest | None = None
    handle: RequestHandle | None = None
    error: MedusaError | None = None


class _Run:
    """Answers the requests that are left, and writes the responses in their order."""

    def __init__(self, plan: BatchPlan, identity: BatchIdentity, engine: Engine, file: BinaryIO) -> None:
        self._plan, self._identity, self._engine, self._file = plan, identity, engine, file
        self._texts = TokenTexts(engine.tokenizer)
        self._statuses = Counter[int]()
        self._failures: list[int] = []  # sizes of the file before each of the last responses, if they are failures

    def answer(self, finished: Finished, facts: BatchFacts) -> BatchSummary:
        """Answer all requests behind the finished ones.

        Raises:
            BatchError: The file of requests changed meanwhile; the output stays unfinished.
        """
        progress, engine = Progress(), self._engine
        self._statuses.update(finished.statuses)
        whole = blake2b()

        def requests() -> Iterator[BatchRequest]:
            for request in read_requests(self._plan.file):
                whole.update(digest_of(request))
                yield request

        with progress.bar("answering", facts.requests, "requests") as bar:
            bar.advance(finished.count)
            self._answer_all(islice(requests(), finished.count, None), bar)
        if whole.digest() != facts.digest:
            raise BatchError(
                f"{self._plan.file} changed while its requests were answered; expected the same {facts.requests} "
                "requests to the end: repeat the command, with --force if lines before the last ones have changed"
            )
        stats = engine.stats()
        return BatchSummary(
            self._statuses,
            finished.count,
            stats.prompt_tokens,
            stats.completion_tokens,
            stats.tokens_per_step,
            progress.seconds,
        )

    def _answer_all(self, requests: Iterator[BatchRequest], bar: Bar) -> None:
        pending: deque[_Pending] = deque()
        try:
            for request in requests:
                pending.append(self._submit(request))
                if len(pending) > QUEUED:
                    self._write(pending[0])
                    pending.popleft()
                    bar.advance()
            while pending:
                self._write(pending[0])
                pending.popleft()
                bar.advance()
        finally:
            for one in pending:
                if one.handle is not None:
                    one.handle.cancel()

    def _submit(self, request: BatchRequest) -> _Pending:
        plan, request_id = self._plan, self._identity.request_id(request.data)
        try:
            read = read_request(
                request.url,
                request.body,
                plan.params,
                chat_template_arguments=plan.chat_template_arguments,
                sanitize=plan.sanitize,
            )
            params = read.params
            if params.seed is None:
                params = dataclasses.replace(params, seed=seed_of(request.data))
            handle = self._engine.submit(read.prompt, params, **read.options)
        except EngineClosedError:
            raise
        except MedusaError as error:
            return _Pending(request, request_id, error=error)
        return _Pending(request, request_id, read, handle)

    def _write(self, pending: _Pending) -> None:
        """Wait for a response and write it."""
        size = self._file.tell()
        status, body = self._response(pending)
        self._file.write(encode_line(pending.request, pending.request_id, status, body))
        self._file.flush()
        self._statuses[status] += 1
        self._failures = [*self._failures, size] if status >= 500 else []
        if len(self._failures) >= MAX_FAILURES:
            self._file.truncate(self._failures[0])
            raise BatchError(
                f"the last {MAX_FAILURES} requests failed, up to line {pending.request.line} of {self._plan.file}: "
                f"{body['error']['message']}; the responses before them are kept: mend the cause, then repeat the "
                "command"
            )

    def _response(self, pending: _Pending) -> tuple[int, dict[str, Any]]:
        error: MedusaError
        if pending.handle is None or pending.read is None:
            assert pending.error is not None  # noqa: S101 -- there is either an error or a handle
            error, status = pending.error, status_of(pending.error)
        else:
            try:
                result = pending.handle.result()
            except EngineClosedError:
                raise
            except MedusaError as found:
                error, status = found, status_of(found, generating=True)
            else:
                facts = ResponseFacts(
                    id=pending.request_id,
                    created=int(time.time()),
                    model=pending.read.model or self._engine.bundle.model.name,
                    system_fingerprint=self._identity.bundle[:FINGERPRINT],
                )
                skips_special = pending.read.params.skip_special_tokens
                url, texts = pending.request.url, self._texts
                return 200, response_body(url, result, facts, texts, skip_special_tokens=skips_special)
        return status, error_body(error, status)
