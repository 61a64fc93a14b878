import pytest
from medusa_exporter import prompts
from medusa_runtime.errors import PromptError


def test_prompts_are_read_and_blank_lines_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"turns": ["a", "b"], "id": 1}\n\n{"turns": ["c"]}\n')
    assert prompts.read_prompts(path) == [("a", "b"), ("c",)]


def test_categories_stand_beside_their_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"turns": ["a"], "category": "code"}\n\n{"turns": ["b"]}\n{"turns": ["c"], "category": 3}\n')
    assert prompts.read_categories(path) == ["code", None, None]
    assert len(prompts.read_prompts(path)) == 3


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"turns": []}', '{"turns": [" "]}', '{"turns": "a"}', '{"t": ["a"]}']
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"turns": ["a"]}}\n{line}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl:2"):
        prompts.read_prompts(path)


def test_text_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="UTF-8"):
        prompts.read_prompts(tmp_path / "p")


def test_exclusion_looks_past_case_punctuation_and_width():
    kept = prompts.without([("Hello,  World!",), ("new", "hello world"), ("other",)], [("ｈｅｌｌｏ - world",)])
    assert kept == [("other",)]
    assert prompts.turn_keys([("A b.", "a  B"), ("?!",)]) == {"a b", ""}


def test_layout_follows_the_template(tokenizer):
    (ids,) = prompts.prompt_ids(tokenizer, [[{"role": "user", "content": "hi"}]])
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.prompt_ids(tokenizer, []) == []
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompts.render(tokenizer, [conversation], prompt=False) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    ]


def test_a_model_without_a_usable_template_is_refused(template):
    class Bare:
        chat_template = None

    with pytest.raises(PromptError, match="no chat template"):
        prompts.render(Bare(), [])
    with pytest.raises(PromptError, match="refuses a conversation"):
        prompts.render(template("{{ raise_exception('no') }}"), [[{"role": "user", "content": "hi"}]])


def test_only_a_newline_ends_a_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"turns": ["one\u2028two"]}\r\n\n{"turns": ["a\u0085b", "c"]}\n', encoding="utf-8")
    assert prompts.read_prompts(file) == [("one\u2028two",), ("a\u0085b", "c")]


def test_prompts_are_limited_and_an_empty_file_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n\n{"turns": ["c"]}\n')
    assert prompts.load_prompts(file, None) == [("a", "b"), ("c",)]
    assert prompts.load_prompts(file, 1) == [("a", "b")]
    file.write_text("\n")
    with pytest.raises(PromptError, match="holds no prompts"):
        prompts.load_prompts(file, None)
