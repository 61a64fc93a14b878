"""Rows of logits of the real model, SmolLM2-135M-Instruct, recorded once."""

from __future__ import annotations

import numpy as np
import pytest

from ...real.conftest import MODEL
from ...sharing import made_once

ROWS = 200
PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """(tokens of the prompt, tokens of an answer drawn at temperature 1, (200, V) logits that it was drawn from)."""
    path = made_once(tmp_path_factory, "rows", _record) / "rows.npz"
    with np.load(path) as arrays:
        return arrays["prompt"].tolist(), arrays["answer"].tolist(), arrays["logits"]


def _record(folder):
    import torch
    from medusa_exporter.models import ModelSource, load_model, load_tokenizer

    assert MODEL.is_file(), f"{MODEL} is missing: `make model` downloads it"
    source = ModelSource.resolve(str(MODEL))
    model = load_model(source, torch.float32)
    messages = [{"role": "user", "content": PROMPT}]
    prompt = load_tokenizer(source).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=ROWS,
            min_new_tokens=ROWS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    folder.mkdir()
    np.savez(
        folder / "rows.npz",
        prompt=prompt,
        answer=output.sequences[0, len(prompt) :],
        logits=np.stack([row[0].float().numpy() for row in output.logits]),
    )
