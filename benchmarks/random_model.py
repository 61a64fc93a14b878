"""Create a model with random weights, random heads and a byte tokenizer, for measuring speed only.

    python benchmarks/random_model.py --shape 7b --layers 8 -o DIR     # DIR/model and DIR/heads

The time of a step depends on shapes, not on the values of the weights. Random heads predict nothing, so
`medusa-export bench --forced` takes the number of accepted tokens from a recorded run of a real model.

`--shape small --stream 25000` creates a small model whose residual stream has values as large as in real models. Use it
with `medusa-export compare` to test in a minute whether a TensorRT version is numerically stable in fp16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_exporter.output_kinds import HEADS
from medusa_exporter.overwrite_check import JsonKind, Kind, OverwriteError, check_output_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    "7b": {  # Llama 2 7B, Vicuna 7B
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "8b": {  # Llama 3 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
CONFIG = JsonKind("benchmarks/random_model.py", frozenset({"made_by"}))
MODEL = Kind(CONFIG.maker, lambda file: CONFIG.is_ours(file.with_name("config.json")))
MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
END, LARGE = "<end>", 1 + LETTERS.index("e")


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True, help="Sizes of the model.")
    parser.add_argument("--layers", type=int, help="Number of layers, if fewer than the shape has.")
    parser.add_argument("--context", type=int, default=8192, help="Context length in tokens (default: 8192).")
    parser.add_argument(
        "--heads",
        type=int,
        default=4,
        help="Number of Medusa heads, each with one ResBlock as in the paper (default: 4).",
    )
    parser.add_argument(
        "--draft-vocabulary", type=int, help="Number of tokens that the heads can predict (default: all)."
    )
    parser.add_argument("--stream", type=float, help="Largest value of the residual stream, at one token.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder to write.")
    options = parser.parse_args()
    try:
        weights = [file.name for file in (options.output / "model").glob("*.safetensors")]
        check_output_folder(options.output / "model", dict.fromkeys([*MODEL_FILES, *weights], MODEL))
        check_output_folder(options.output / "heads", HEADS)
    except OverwriteError as error:
        parser.error(str(error))
    shape = dict(SHAPES[options.shape], max_position_embeddings=options.context)
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.arange(options.draft_vocabulary) if options.draft_vocabulary else None
    torch.set_default_dtype(torch.float16)
    with torch.device(device):
        shape |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "made_by": MODEL.maker}
        model = LlamaForCausalLM(LlamaConfig(**shape))
        heads = MedusaHeads(shape["hidden_size"], options.heads, 1, token_map=tokens)
    torch.set_default_dtype(torch.float32)
    if options.stream:
        enlarge(model, options.stream)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(options.output / "model")
    tokenizer().save_pretrained(options.output / "model")
    name = f"random-{options.shape}-{shape['num_hidden_layers']}"
    save_heads(
        heads.cpu(),
        options.output / "heads",
        {"base_model_name_or_path": name, "vocab_size": shape["vocab_size"]},
    )
    print(f"{options.output}: {sum(one.numel() for one in model.parameters()) / 1e6:,.0f} M parameters")


def enlarge(model: Any, largest: float) -> None:
    """Set one element of one token's embedding to `largest`; the residual stream carries it through all layers.

    Real models have such values at the first token of a text and at delimiters; all other values are much smaller.
    """
    with torch.no_grad():
        model.model.embed_tokens.weight[LARGE, 7] = largest


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte."""
    core = Tokenizer(models.BPE(vocab={END: 0} | {letter: 1 + i for i, letter in enumerate(LETTERS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, chat_template=template)


if __name__ == "__main__":
    main()
