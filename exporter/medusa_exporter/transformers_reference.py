"""The original model, run by transformers: what a bundle's plain decoding is verified against."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.errors import UnsupportedModelError
from medusa_runtime.facts import ModelFacts

from medusa_exporter import models
from medusa_exporter.console import Verbosity, verbosity
from medusa_exporter.extras import import_extra
from medusa_exporter.models import ModelSource

COMPARED = ("family", "layers", "hidden_size", "attention_heads", "kv_heads", "head_dim", "vocab_size")


class TransformersReference:
    """The model in fp32 on the CPU, with greedy decoding and a KV cache."""

    def __init__(self, model: str, facts: ModelFacts, revision: str | None = None) -> None:
        """Load the model.

        Args:
            model: Hub name, folder or GGUF file.
            facts: The model as the bundle describes it; the loaded one must have the same sizes.
            revision: Branch, tag or commit of a hub model, `None` for its main branch.

        Raises:
            MissingExtraError: torch or transformers is not installed.
            UnsupportedModelError: `model` is no model that can be loaded, or one of other sizes.
        """
        torch = import_extra("torch", "export")
        transformers = import_extra("transformers", "export")
        if verbosity() < Verbosity.VERBOSE:
            transformers.utils.logging.set_verbosity_error()
        from medusa_exporter.model_facts import model_facts

        source = ModelSource.resolve(model, revision)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = models.load_model(source, torch.float32)
        found = model_facts(self._model, source, facts.eos_token_ids, facts.context)
        for name in COMPARED:
            if getattr(found, name) != getattr(facts, name):
                raise UnsupportedModelError(
                    f"{model}: its {name} is {getattr(found, name)}, the bundle's is {getattr(facts, name)}; "
                    "give the model that the bundle was built from"
                )
        self._torch, self._context = torch, facts.context
        stop = list(facts.eos_token_ids)
        # not the settings of the model, which may ask for sampling or penalties
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, num_beams=1, use_cache=True, eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0
        )

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the token ids of the greedy answer, with the end token; it ends as the answer of a `Decoder` does."""
        ids = self._torch.tensor([list(prompt)])  # (1, P)
        with self._torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=min(max_new_tokens, self._context - len(prompt)),
            )
        answer: list[int] = whole[0, ids.shape[1] :].tolist()
        return answer

    def next_logits(self, ids: list[int]) -> FloatArray:
        """Return the logits of the token after `ids`, shape (V,)."""
        with self._torch.inference_mode():
            logits: FloatArray = self._model(self._torch.tensor([ids])).logits[0, -1].numpy()
        return logits
