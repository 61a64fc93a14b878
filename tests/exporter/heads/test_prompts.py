import pytest
from medusa_exporter.heads import prompts
from medusa_runtime.errors import PromptError


def test_prompts_are_read_and_blank_lines_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"turns": ["a", "b"], "id": 1}\n\n{"turns": ["c"]}\n')
    assert prompts.read_prompts(path) == [("a", "b"), ("c",)]


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
    assert prompts.distinct(["A b.", "a  B", "", " ?! ", "c"]) == ["A b.", "c"]


def test_layout_and_frame_follow_the_template(tokenizer):
    (ids,) = prompts.lay_out(tokenizer, [[{"role": "user", "content": "hi"}]])
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.lay_out(tokenizer, []) == []
    assert prompts.user_frame(tokenizer) == ("<|im_start|>user\n", "<|im_end|>")


def test_a_model_without_a_usable_template_is_refused(tokenizer):
    class Bare:
        chat_template = None

    class Deaf:
        chat_template = "x"

        def apply_chat_template(self, *_, **__):
            return "nothing of it"

    with pytest.raises(PromptError, match="no chat template"):
        prompts.lay_out(Bare(), [[{"role": "user", "content": "hi"}]])
    with pytest.raises(PromptError, match="does not show"):
        prompts.user_frame(Deaf())


def test_only_a_newline_ends_a_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"turns": ["one\u2028two"]}\r\n\n{"turns": ["a\u0085b", "c"]}\n', encoding="utf-8")
    assert prompts.read_prompts(file) == [("one\u2028two",), ("a\u0085b", "c")]
