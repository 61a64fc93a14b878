"""Random JSON schemas, a validator of exactly the keywords that they use, and a tokenizer that writes JSON."""

import functools
import re

import tokenizers
from medusa_runtime.tokenizer import Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

CHARACTERS = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]  # printable ASCII, space and line feed
NAMES = ["id", "name", "age", "city", "tags", "is_new", "a b", "größe", 'q"uote', "price", "x", "item_count"]
TEXTS = ['{"name": "Ann", "age": 31, "city": "Rome", "tags": ["a", "bc"], "price": -12.50, "is_new": true}'] * 4
PATTERNS = ["^[a-c]{1,4}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no|may be)$", "^x*y{2}$", "^[A-Z][a-z]{0,3}$"]


@functools.cache
def json_tokenizer():
    """A byte-level tokenizer of about 150 tokens of one and more characters; the last one ends an answer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [*CHARACTERS, *"Ã¶ŁĦ"]  # of ö and ß
    trainer = trainers.BpeTrainer(vocab_size=150, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<end>"])
    return Tokenizer(tokenizer.to_str().encode(), "json.json")


def vocabulary_size():
    return json_tokenizer().core.get_vocab_size(with_added_tokens=True)


def random_schema(rng, depth=2):
    """A schema of which every valid document is short."""
    kinds = ["integer", "number", "string", "pattern", "boolean", "null", "enum", "const", "anyOf"]
    kind = str(rng.choice(kinds + ["object", "array"] * 4 if depth else kinds))
    if kind == "object":
        names = [NAMES[at] for at in rng.permutation(len(NAMES))[: int(rng.integers(0, 5))]]
        required = [name for name in names if rng.random() < 0.6]
        properties = {name: random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = int(rng.integers(0, 3))
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": least,
            "maxItems": least + int(rng.integers(0, 3)),
        }
    least = int(rng.integers(-200, 200))
    return {
        "integer": {"type": "integer", "minimum": least, "maximum": least + int(rng.integers(0, 300))},
        "number": {"type": "number", "minimum": least / 8, "maximum": least / 8 + 40},
        "string": {"type": "string", "minLength": int(rng.integers(0, 3)), "maxLength": int(rng.integers(3, 9))},
        "pattern": {"type": "string", "pattern": str(rng.choice(PATTERNS)), "maxLength": 12},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": [str(rng.choice(NAMES)), least / 8, None, "two words"]},
        "const": {"const": {"kind": str(rng.choice(NAMES)), "list": [1, 2.5, True]}},
        "anyOf": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}]},
    }[kind]


def is_valid(schema, value):
    """Whether a value matches a schema; only the keywords of `random_schema`."""
    if "anyOf" in schema:
        return any(is_valid(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return any(is_valid({"const": one}, value) for one in schema["enum"])
    if "const" in schema:
        return equal(value, schema["const"])
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(is_valid(schema["properties"][name], one) for name, one in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(is_valid(schema["items"], one) for one in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "number":
        return type(value) in (int, float) and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
            and re.search(schema.get("pattern", ""), value) is not None
        )
    return value is None if kind == "null" else isinstance(value, bool)


def equal(one, other):
    """Whether two values are the same in JSON, where 2 and 2.0 are, and 1 and true are not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)
