import pytest
from medusa_exporter.distillation.attention import lockstep_obstacle
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM


def test_a_plain_decoder_is_served(model, other_model):
    assert lockstep_obstacle(model, 256) is None
    assert lockstep_obstacle(other_model.bfloat16().float(), 64) is None


def test_half_precision_is_served(model):
    import copy

    assert lockstep_obstacle(copy.deepcopy(model).bfloat16(), 256) is None


@pytest.mark.parametrize(("window", "served"), [(16, False), (64, True), (None, True)])
def test_a_sliding_window_must_reach_over_the_context(mistral, window, served):
    reason = lockstep_obstacle(mistral(window), 64)
    assert (reason is None) == served
    assert served or "sliding window of 16" in reason


def test_foreign_layers_are_noticed(own_model, monkeypatch):
    attention = type(own_model.base_model.layers[0].self_attn)
    real = attention.forward

    def of_its_own(self, hidden_states, **_):  # looks back, but not through the cache
        return hidden_states.cumsum(dim=1), None

    monkeypatch.setattr(attention, "forward", of_its_own)
    assert "ALL_ATTENTION_FUNCTIONS" in lockstep_obstacle(own_model, 64)

    def demanding(self, *arguments, past_key_values=None, **named):
        if past_key_values is not None:
            past_key_values.layers[self.layer_idx].no_such_thing()
        return real(self, *arguments, **named)

    monkeypatch.setattr(attention, "forward", demanding)
    assert "do not accept a static cache (AttributeError" in lockstep_obstacle(own_model, 64)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_bounded_scores_are_noticed_though_they_change_small_ones_little():
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, vocab_size=32, attn_implementation="eager")
    assert "do not accept a static cache (NotImplementedError: attention with softcap)" in lockstep_obstacle(
        Gemma2ForCausalLM(config).eval(), 64
    )
    config.attn_logit_softcapping = None
    assert lockstep_obstacle(Gemma2ForCausalLM(config).eval(), 64) is None


def test_scaled_logits_are_the_models():
    config = GraniteConfig(**SIZES, num_key_value_heads=1, vocab_size=32, logits_scaling=8.0, pad_token_id=0)
    assert lockstep_obstacle(GraniteForCausalLM(config).eval(), 64) is None
