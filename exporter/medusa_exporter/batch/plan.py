"""What a batch is asked to do, and what it has done."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_runtime.bundle import Bundle
from medusa_runtime.sampling_params import SamplingParams

from medusa_exporter.batch.identity import BatchIdentity


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
        del parameters["draft"]  # no token depends on it, nor on the tree
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
