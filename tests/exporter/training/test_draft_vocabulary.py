import numpy as np
import pytest
import torch
import transformers
from medusa_exporter.distillation.dataset import DataError
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.training import draft_vocabulary, hidden_states
from medusa_exporter.training.accuracy import measure_hits


def test_the_most_frequent_tokens_of_the_answers(counting_data):
    counts = np.bincount(counting_data.tokens[counting_data.answer], minlength=256)
    found = draft_vocabulary.most_frequent(counting_data, 20)
    assert found.tolist() == sorted(found.tolist())
    assert counts[found].min() >= np.delete(counts, found).max()
    assert draft_vocabulary.coverage(counting_data, found.numpy()) == pytest.approx(counts[found].sum() / counts.sum())
    for size in (0, 257):
        with pytest.raises(DataError, match="expected 1 to the model's 256"):
            draft_vocabulary.most_frequent(counting_data, size)


def test_tokens_in_terms_of_rows(model):
    heads = MedusaHeads(64, 1, 1, token_map=torch.tensor([5, 9, 200]))
    targets = torch.tensor([[9, 5], [200, 7], [-100, 0]], dtype=torch.int32)
    assert draft_vocabulary.tokens_to_rows(heads, targets, 256).tolist() == [[1, 0], [2, -2], [-100, -2]]
    assert draft_vocabulary.tokens_to_rows(MedusaHeads(64, 1, 1), targets, 256).tolist() == targets.tolist()
    weight = model.get_output_embeddings().weight
    assert torch.equal(draft_vocabulary.draft_lm_head(model, heads), weight[[5, 9, 200]])


def test_ranks_within_a_draft_vocabulary(model, counting_data):
    found = hidden_states.collect_positions(model, counting_data, 2)
    token_map = torch.arange(100, 116)
    hits = measure_hits(MedusaHeads(64, 2, 1, token_map=token_map), model, found)
    logits = found.hidden @ model.get_output_embeddings().weight[token_map].T
    for position in range(0, len(found), 131):
        for head in range(2):
            target = int(found.targets[position, head])
            expected = -2 if target == -100 else -1
            if 100 <= target < 116:
                expected = int((logits[position] > logits[position, target - 100]).sum())
            assert hits[position, head] == expected
    assert {-2, -1, 0} < set(hits.ravel().tolist())


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (transformers.CohereForCausalLM, {"logit_scale": 0.0625}),
        (transformers.GraniteForCausalLM, {"logits_scaling": 8.0}),
        (transformers.LlamaForCausalLM, {}),
    ],
)
@torch.no_grad()
def test_scores_are_scaled_as_the_decoders_logits(kind, option):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes, **option))
    ids = torch.tensor([[3, 1, 2]])
    hidden, logits = model.eval().base_model(ids).last_hidden_state, model(ids).logits
    for token_map in (None, torch.tensor([5, 9, 20])):
        heads = MedusaHeads(16, 1, 1, "none", token_map=token_map)
        expected = logits if token_map is None else logits[..., token_map]
        found = torch.nn.functional.linear(hidden, draft_vocabulary.draft_lm_head(model, heads))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
