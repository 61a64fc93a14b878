import numpy as np
import pytest
import torch
from medusa_exporter.heads.modules import MedusaHeads

H, K, V = 8, 3, 11


def random_heads(layers=2, conditioning="none", own=None, token_map=None):
    torch.manual_seed(0)
    heads = MedusaHeads(H, K, layers, conditioning, own, token_map)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
    return heads


def reference(heads, hidden, root):
    """Each head by itself, with torch.nn.Linear, as the paper writes it."""
    out = []
    for k in range(heads.heads):
        x = hidden
        for j, (weight, bias) in enumerate(zip(heads.weights, heads.biases, strict=True)):
            linear = torch.nn.Linear(weight.shape[1], H)
            linear.weight.data, linear.bias.data = weight[k].detach().T, bias[k, 0].detach()
            taken = torch.cat([x, root], dim=-1) if j == 0 and heads.conditioning == "root" else x
            x = torch.nn.SiLU()(linear(taken)) + x
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("conditioning", ["none", "root"])
def test_features_equal_the_formula_per_head(layers, conditioning):
    heads = random_heads(layers, conditioning)
    hidden, root = torch.randn(5, H), torch.randn(5, H)
    torch.testing.assert_close(heads.features(hidden, root), reference(heads, hidden, root))


def test_untrained_heads_are_the_decoders_own_distribution():
    hidden, lm_head = torch.randn(4, H), torch.nn.Linear(H, V, bias=False)
    heads = MedusaHeads(H, K, 2, "root")
    logits = heads.logits(heads.features(hidden, torch.randn(4, H)), lm_head)
    torch.testing.assert_close(logits, lm_head(hidden).expand(K, 4, V))


def test_own_lm_heads_are_applied_per_head():
    heads = random_heads(own=V)
    features = torch.randn(K, 4, H)
    expected = torch.stack([features[k] @ heads.own_lm_head[k] for k in range(K)])
    torch.testing.assert_close(heads.logits(features, lambda rows: rows), expected)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_proposals_are_the_likeliest_tokens_of_each_head(rows):
    heads, lm_head = random_heads(conditioning="root"), torch.nn.Linear(H, V)
    hidden, root = torch.randn(rows, H), torch.randn(rows, H)
    proposals = heads.propose(hidden, root, lm_head, 3)
    assert proposals.shape == (rows, K, 3)
    assert proposals.dtype == torch.int64
    logits = lm_head(reference(heads, hidden, root)).detach().numpy()
    expected = np.argsort(-logits, axis=-1)[..., :3].transpose(1, 0, 2)
    np.testing.assert_array_equal(proposals.numpy(), expected)


@pytest.mark.parametrize("own", [False, True])
def test_a_draft_vocabulary_proposes_the_decoders_tokens(own):
    token_map = torch.tensor([7, 2, 10, 0, 5])
    heads, lm_head = random_heads(own=5 if own else None, token_map=token_map), torch.nn.Linear(H, V, bias=False)
    hidden = torch.randn(4, H)
    proposals = heads.propose(hidden, None, lambda rows: rows @ lm_head.weight[token_map].T, 3)
    features = reference(heads, hidden, None)
    scores = features @ heads.own_lm_head if own else lm_head(features)[..., token_map]
    ranked = np.argsort(-scores.detach().numpy(), axis=-1)[..., :3]
    np.testing.assert_array_equal(proposals.numpy(), token_map.numpy()[ranked].transpose(1, 0, 2))
    assert heads.logits(heads.features(hidden), lambda rows: rows @ lm_head.weight[token_map].T).shape == (K, 4, 5)


@pytest.mark.parametrize(
    ("token_map", "own", "message"),
    [
        (torch.tensor([[1, 2]]), None, r"\(D,\) int64.*\(1, 2\)"),
        (torch.tensor([1.0, 2.0]), None, "float32"),
        (torch.zeros(0, dtype=torch.int64), None, "at least 1"),
        (torch.tensor([1, 2, 1]), None, "distinct"),
        (torch.tensor([1, -2]), None, "negative"),
        (torch.tensor([1, 2]), V, "11 rows under a token_map of 2"),
    ],
)
def test_what_is_no_token_map_is_refused(token_map, own, message):
    with pytest.raises(ValueError, match=message):
        MedusaHeads(H, K, 1, own_lm_head_size=own, token_map=token_map)


def test_dropout_leaves_units_out_while_training_only():
    """Half of what a block adds is dropped and the rest doubled, so each of its units is 0 or twice its value."""
    hidden = torch.randn(50, H)
    for trunk in (0, 5):
        heads = MedusaHeads(H, K, 1, trunk=trunk, dropout=0.5)
        with torch.no_grad():
            for bias in heads.biases:
                bias.fill_(1.0)
        whole = heads.eval().features(hidden)
        assert torch.equal(whole, heads.features(hidden))
        added, dropped = whole - hidden, heads.train().features(hidden) - hidden
        kept = dropped.abs() > 1e-6
        torch.testing.assert_close(dropped[kept], 2 * added[kept])
        assert 0.4 < kept.float().mean() < 0.6


def test_a_missing_root_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="root_embedding"):
        MedusaHeads(H, K, 1, "root").features(torch.zeros(1, H))
    with pytest.raises(ValueError, match="at least 1"):
        MedusaHeads(H, 0, 1)
    with pytest.raises(ValueError, match="conditioning"):
        MedusaHeads(H, K, 1, "leaf")


@pytest.mark.parametrize("conditioning", ["none", "root"])
@pytest.mark.filterwarnings("ignore")  # the exporter warns of its own deprecations
def test_the_onnx_export_serves_every_number_of_rows(conditioning):
    import onnxruntime

    heads, lm_head = random_heads(conditioning=conditioning), torch.nn.Linear(H, V)

    class Draft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.lm_head = heads, lm_head

        def forward(self, hidden, root):
            return self.heads.propose(hidden, root, self.lm_head, 3)

    rows = torch.export.Dim.DYNAMIC
    example = (torch.randn(2, H), torch.randn(2, H))
    program = torch.onnx.export(
        Draft().eval(), example, dynamo=True, verbose=False, dynamic_shapes=({0: rows}, {0: rows}), opset_version=23
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (0, 1, 5):
        hidden, root = torch.randn(n, H), torch.randn(n, H)
        feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (hidden, root), strict=False)}
        (found,) = session.run(None, feed)
        np.testing.assert_array_equal(found, heads.propose(hidden, root, lm_head, 3).numpy())
