"""Converts the bodies of OpenAI's API to requests of an engine, and results and errors to bodies; pure functions.

`read_request` reads a body of `/v1/chat/completions` or `/v1/completions`, `response_body` and `error_body` write what
comes back. Fields that vLLM adds to OpenAI's keep vLLM's names.
"""

from medusa_runtime.openai_format.failures import BodyError, error_body, status_of
from medusa_runtime.openai_format.fields import CHAT, COMPLETIONS
from medusa_runtime.openai_format.requests import OpenAIRequest, read_request
from medusa_runtime.openai_format.responses import ResponseFacts, response_body
from medusa_runtime.openai_format.token_texts import TokenTexts

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "BodyError",
    "OpenAIRequest",
    "ResponseFacts",
    "TokenTexts",
    "error_body",
    "read_request",
    "response_body",
    "status_of",
]
