import pytest
import torch
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.training import hidden_states, losses
from medusa_exporter.training.draft_vocabulary import draft_lm_head

HEADS = 3


@pytest.fixture(scope="module")
def found(model, counting_data):
    return hidden_states.collect_positions(model, counting_data, HEADS)


def random_heads(**more):
    torch.manual_seed(3)
    heads = MedusaHeads(64, HEADS, 2, "root", **more)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.05)
    return heads


def run(model, found, heads, chosen, targets, loss):
    """Gradients by step_gradients, and the features that plain autograd can start from."""
    inputs = found.hidden[chosen], model.get_input_embeddings()(found.root[chosen])
    wanted = [targets(head, chosen) for head in range(HEADS)]
    values = losses.step_gradients(heads, inputs, draft_lm_head(model, heads), wanted, loss, 0.8)
    gradients = [parameter.grad.clone() for parameter in heads.parameters()]
    heads.zero_grad()
    return values, gradients, heads.features(*inputs)


def backward(heads, each):
    sum(0.8**k * loss for k, loss in enumerate(each)).backward()
    return [parameter.grad for parameter in heads.parameters()]


@pytest.mark.parametrize("token_map", [None, torch.arange(100, 120)])
def test_gradients_are_those_of_the_weighted_loss(model, found, token_map):
    heads, chosen = random_heads(token_map=token_map, trunk=16), torch.arange(0, len(found), 97)
    targets = losses.token_targets(heads, found, 256)
    values, gradients, features = run(model, found, heads, chosen, targets, losses.token_loss)
    weight = model.get_output_embeddings().weight
    logits = features @ (weight if token_map is None else weight[token_map]).T
    each = []
    for k in range(HEADS):
        target = found.targets[chosen, k].long()
        if token_map is not None:
            target = torch.where((target >= 100) & (target < 120), target - 100, -100)
            assert 0 < (target >= 0).sum() < len(chosen)
        each.append(torch.nn.functional.cross_entropy(logits[k], target))
    torch.testing.assert_close(values, torch.stack(each).detach())
    for one, other in zip(gradients, backward(heads, each), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_other_target_is_the_decoders_distribution_where_the_token_will_stand(model, found, counting_data):
    heads, chosen = random_heads(), torch.arange(0, len(found), 37)
    targets = losses.kl_targets(heads, found)
    values, gradients, features = run(model, found, heads, chosen, targets, losses.kl_loss)
    logits, each = model.get_output_embeddings()(features), []
    for k in range(HEADS):
        terms = []
        for line, position in enumerate(chosen.tolist()):
            row = int(found.row[position])
            place = int(found.place[position]) - int(counting_data.offsets[row])
            tokens = torch.from_numpy(counting_data.row(row)[0].astype("int64"))
            if place + 1 + k < len(tokens) - 2:  # the state there is kept, so it can teach
                decoder = model(input_ids=tokens[None, : place + 2 + k]).logits[0, -1]
                terms.append(-(decoder.softmax(-1) * logits[k, line].log_softmax(-1)).sum())
        assert 0 < len(terms) < len(chosen)
        each.append(torch.stack(terms).mean())
    torch.testing.assert_close(values, torch.stack(each).detach(), atol=1e-4, rtol=1e-4)
    for one, other in zip(gradients, backward(heads, each), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
