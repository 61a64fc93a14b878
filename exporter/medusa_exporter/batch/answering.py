"""Answers a file of requests in OpenAI's batch format with an engine, and resumes a run that was interrupted."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from itertools import islice
from typing import Any

from medusa_runtime.bundle import Bundle
from medusa_runtime.engine import Engine
from medusa_runtime.errors import BundleError, EngineClosedError, MedusaError, MissingExtraError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.openai_format import (
    ResponseFacts,
    TokenTexts,
    error_body,
    read_request,
    response_body,
    status_of,
)
from medusa_runtime.openai_format.failures import SERVER_ERROR
from medusa_runtime.results import GenerationResult

from medusa_exporter.batch.identity import BatchIdentity, seed_of
from medusa_exporter.batch.plan import BatchPlan, BatchSummary
from medusa_exporter.batch.requests_file import (
    BatchError,
    BatchFacts,
    BatchRequest,
    check_requests,
    digest_of,
    read_requests,
)
from medusa_exporter.batch.responses_file import Finished, ResponsesFile, count_finished, encode_line
from medusa_exporter.console import Bar, Progress, note, warn
from medusa_exporter.library_logging import ends_are_not_logged
from medusa_exporter.wording import counted

QUEUED = 8  # requests that the engine has at a time, so that prompts are encoded while answers are generated
MAX_FAILURES = 8  # requests in a row that may fail, before the engine and not the requests is at fault
FINGERPRINT = 16  # hexadecimal digits of the bundle's digest in `system_fingerprint`


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
        MissingExtraError: A request needs a package that is not installed.
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
        note(f"{plan.output} is up to date, {counted(done.count, 'response')}; --force answers all requests anew")
        return BatchSummary(done.statuses, done.count)
    with output.open_part() as file:
        finished = Finished() if force else _count(output, plan, identity)
        output.cut(file, finished.size)
        summary = BatchSummary(finished.statuses, finished.count)
        if finished.count < facts.requests:
            with load() as engine, ends_are_not_logged():  # the responses have the reasons, by custom_id
                summary = _Run(plan, identity, engine, output, file).answer(finished, facts)
        output.publish(file)
    return summary


def _count(output: ResponsesFile, plan: BatchPlan, identity: BatchIdentity) -> Finished:
    finished = count_finished(output.part, output.part, read_requests(plan.file), identity)
    if finished.count:
        note(f"resuming behind {counted(finished.count, 'response')} in {output.part}")
    return finished


@dataclass(frozen=True)
class _Pending:
    """A request that was read, and its handle, or the error that it was refused with."""

    request: BatchRequest
    request_id: str
    outcome: RequestHandle | MedusaError
    model: str | None = None
    skip_special_tokens: bool = True


class _Run:
    """Answers the requests that are left, and writes the responses in their order."""

    def __init__(
        self, plan: BatchPlan, identity: BatchIdentity, engine: Engine, output: ResponsesFile, file: FileIO
    ) -> None:
        self._plan, self._identity, self._engine = plan, identity, engine
        self._output, self._file = output, file
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
            count = counted(facts.requests, "request")
            raise BatchError(
                f"{self._plan.file} changed while its requests were answered; expected the same {count} to the "
                "end: repeat the command, with --force if lines before the last ones have changed"
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
                if isinstance(one.outcome, RequestHandle):
                    one.outcome.cancel()

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
        except (EngineClosedError, MissingExtraError):  # no fault of the request's
            raise
        except MedusaError as error:
            return _Pending(request, request_id, error)
        return _Pending(request, request_id, handle, read.model, params.skip_special_tokens)

    def _write(self, pending: _Pending) -> None:
        """Wait for a response and write it."""
        size, request, status = self._file.tell(), pending.request, 200
        found = self._wait(pending.outcome)
        if isinstance(found, MedusaError):
            status = status_of(found, generating=isinstance(pending.outcome, RequestHandle))
            body = error_body(found, status)
        else:
            body = self._body(pending, found)
        self._output.append(self._file, encode_line(request, pending.request_id, status, body))
        self._statuses[status] += 1
        if status < SERVER_ERROR:
            self._failures = []
            return
        warn(f"{self._plan.file}:{request.line} failed: {found}")
        self._failures.append(size)
        if len(self._failures) >= MAX_FAILURES:
            self._output.cut(self._file, self._failures[0])
            raise BatchError(
                f"the last {MAX_FAILURES} requests failed, up to line {request.line} of {self._plan.file}: {found}; "
                "the responses before them are kept: mend the cause, then repeat the command"
            )

    def _wait(self, outcome: RequestHandle | MedusaError) -> GenerationResult | MedusaError:
        """Return the result of a request, or the error that it was refused or ended with."""
        if isinstance(outcome, MedusaError):
            return outcome
        try:
            return outcome.result()
        except EngineClosedError:
            raise
        except MedusaError as error:
            return error

    def _body(self, pending: _Pending, result: GenerationResult) -> dict[str, Any]:
        facts = ResponseFacts(
            id=pending.request_id,
            created=int(time.time()),
            model=pending.model or self._engine.bundle.model.name,
            system_fingerprint=self._identity.bundle[:FINGERPRINT],
        )
        return response_body(
            pending.request.url, result, facts, self._texts, skip_special_tokens=pending.skip_special_tokens
        )
