"""The package's logger. Prompts and answers are never logged, only numbers of requests and of tokens."""

import logging

LOGGER = logging.getLogger("medusa_runtime")
