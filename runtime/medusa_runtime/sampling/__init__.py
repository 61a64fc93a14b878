"""How the next token is chosen: processors, filters, the draw, and log-probabilities.

`Sampler` is the entry; every other module is a step of it. `docs/concepts/sampling.md` has the formulas.
"""

from medusa_runtime.sampling.bad_words import bad_word_ids
from medusa_runtime.sampling.logprobs import token_logprobs
from medusa_runtime.sampling.sampler import Sampler

__all__ = ["Sampler", "bad_word_ids", "token_logprobs"]
