"""A tiny random Llama with a tokenizer of single characters and a chat template."""

import numpy as np
import pytest
import torch

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
SIZES = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower with two threads than with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    characters = [*SPECIAL, "\n", *map(chr, range(32, 127))]
    core = Tokenizer(BPE({text: number for number, text in enumerate(characters)}, []))
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[1], additional_special_tokens=[SPECIAL[0]], chat_template=TEMPLATE
    )


@pytest.fixture
def template(tokenizer):
    """The tokenizer with another chat template."""
    import copy

    def with_template(text):
        other = copy.deepcopy(tokenizer)
        other.chat_template = text
        return other

    return with_template


def make_model(seed=0, hidden=64, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=96,
        tie_word_embeddings=True,
        **SIZES,
        **settings,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def other_model():
    return make_model(seed=1)


@pytest.fixture
def own_model():
    """A model that a test may change."""
    return make_model()


@pytest.fixture(scope="session")
def mistral():
    """A tiny Mistral with a sliding window, or none."""
    from transformers import MistralConfig, MistralForCausalLM

    def made(window):
        torch.manual_seed(0)
        config = MistralConfig(
            hidden_size=32,
            intermediate_size=48,
            sliding_window=window,
            **SIZES,
        )
        return MistralForCausalLM(config).requires_grad_(False).eval()

    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def counting_data(model):
    """Rows that count upwards modulo 32: what follows a token is certain, so heads can learn it."""
    from medusa_exporter.distillation.dataset import DataFacts, from_rows, group_of
    from medusa_exporter.training.model_digest import model_digest

    facts = DataFacts("tiny-llama", model_digest(model), 256, (1,), 0, {})
    rows = []
    for number in range(120):
        counted = (np.arange(40) + number) % 32 + 100
        rows.append((counted, np.arange(40) >= 4, 0.0 if number % 3 else 0.7, group_of(str(number))))
    return from_rows(facts, rows)
