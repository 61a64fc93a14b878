"""What quantisation costs, against figures worked out from the logits of whole texts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from medusa_exporter import quality
from medusa_exporter.quality import Text, as_table, log_probabilities, measure_quality
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder

TEXTS = [Text(tuple(range(3, 13)), (20, 21, 22, 30)), Text((5, 6), (7,)), Text((9,), ())]


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_chunks_change_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    backend = load_backend(Bundle.open(tiny_bundle))
    decoder = Decoder(backend)
    expected = []
    for end in range(len(TEXTS[0].answer)):
        decoder.start([*TEXTS[0].prompt, *TEXTS[0].answer[:end]], 1, stop_ids=())
        logits = backend.read_logits(0).astype(np.float64)
        expected.append(logits - math.log(np.exp(logits).sum()))
    del decoder
    monkeypatch.setattr(quality, "CHUNK", chunk)
    again, asked = load_backend(Bundle.open(tiny_bundle)), []
    monkeypatch.setattr(again, "run", lambda step, run=again.run: (asked.append(step.logit_rows.size), run(step))[1])
    found = [row.copy() for row in log_probabilities(again, TEXTS[0])]
    assert min(asked) > 0  # ONNX Runtime 1.31 fails at a step that nothing is read of
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_graph_beside_itself_and_beside_its_quantised_form(tiny_precisions: Path) -> None:
    bundle = Bundle.open(tiny_precisions)
    same = measure_quality(load_backend(bundle), load_backend(bundle), TEXTS)
    assert (same.positions, same.agreement) == (5, 1.0)
    assert same.divergence == pytest.approx(0, abs=1e-12)
    assert same.perplexity == same.reference_perplexity
    int8, int4 = (
        measure_quality(load_backend(bundle), load_backend(bundle, precision=p), TEXTS) for p in ("int8", "int4")
    )
    assert 0 < int8.divergence < int4.divergence
    assert int8.reference_perplexity == pytest.approx(same.perplexity)
    assert int8.perplexity != int4.perplexity
    table = as_table({"int8": int8, "int4": int4}).splitlines()
    assert [line.split()[0] for line in table] == ["precision", "int8", "int4"]
    assert f"{int8.divergence:.4f}" in table[1]


def test_figures_by_hand(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"a": [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], "b": [[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]}
    monkeypatch.setattr(quality, "log_probabilities", lambda backend, text: iter(np.log(rows[backend])))
    found = measure_quality("a", "b", [Text((0,), (0, 1))])  # type: ignore[arg-type]
    assert found.agreement == 0.5
    assert found.divergence == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    assert found.perplexity == pytest.approx(math.sqrt(8))
    assert found.reference_perplexity == pytest.approx(2)


def test_no_answers_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="no answer"):
        measure_quality(load_backend(Bundle.open(tiny_bundle)), load_backend(Bundle.open(tiny_bundle)), TEXTS[2:])
