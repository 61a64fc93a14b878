"""The options of sampling parameters: each reaches its field, and what `SamplingParams` refuses is wrong usage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from medusa_exporter.cli.sampling_options import sampling_options
from medusa_runtime.accept import Typical
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.structured.outputs import StructuredOutputs


def parsed(*words: str) -> SamplingParams | str:
    """The parameters that a command gets, or why it is refused."""
    kept: list[SamplingParams] = []

    @click.command()
    @click.option("--other")
    @sampling_options
    def command(other: str | None, params: SamplingParams) -> None:
        assert other is None
        kept.append(params)

    done = CliRunner().invoke(command, words)
    if done.exit_code == 0:
        return kept[0]
    assert done.exit_code == 2, done.output
    return done.output


def test_without_options_the_parameters_are_the_defaults() -> None:
    assert parsed() == SamplingParams()


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--max-tokens", "5"], {"max_tokens": 5}),
        (["--max-new-tokens", "5"], {"max_tokens": 5}),
        (["--min-tokens", "2"], {"min_tokens": 2}),
        (["--temperature", "0.7"], {"temperature": 0.7}),
        (["--top-p", "0.9"], {"top_p": 0.9}),
        (["--top-k", "-1"], {"top_k": 0}),
        (["--min-p", "0.1"], {"min_p": 0.1}),
        (["--seed", str(2**64 - 1)], {"seed": 2**64 - 1}),
        (["--n", "3", "--temperature", "1"], {"n": 3, "temperature": 1.0}),
        (["--stop", "a,b", "--stop", r"\n\t\\n\r"], {"stop": ("a,b", "\n\t\\n\r")}),
        (["--stop-token-ids", "1,2", "--stop-token-ids", "3"], {"stop_token_ids": (1, 2, 3)}),
        (["--include-stop-str-in-output"], {"include_stop_str_in_output": True}),
        (["--ignore-eos"], {"ignore_eos": True}),
        (["--no-skip-special-tokens"], {"skip_special_tokens": False}),
        (["--skip-special-tokens"], {"skip_special_tokens": True}),
        (["--logprobs", "0"], {"logprobs": 0}),
        (["--repetition-penalty", "1.2"], {"repetition_penalty": 1.2}),
        (["--presence-penalty", "-2"], {"presence_penalty": -2.0}),
        (["--frequency-penalty", "0.5"], {"frequency_penalty": 0.5}),
        (["--logit-bias", "5=-100,6=1", "--logit-bias", "7=2e1"], {"logit_bias": {5: -100.0, 6: 1.0, 7: 20.0}}),
        (["--allowed-token-ids", "7,8"], {"allowed_token_ids": (7, 8)}),
        (["--bad-words", "no", "--bad-words", r"\\"], {"bad_words": ("no", "\\")}),
        (["--truncate-prompt-tokens", "-1"], {"truncate_prompt_tokens": -1}),
        (["--acceptance", "typical"], {"acceptance": Typical()}),
        (
            ["--acceptance", "typical", "--typical-epsilon", "0.2", "--typical-delta", "0.4"],
            {"acceptance": Typical(0.2, 0.4)},
        ),
        (["--acceptance", "typical", "--typical-temperature", "0.5"], {"acceptance": Typical(temperature=0.5)}),
    ],
)
def test_an_option_sets_its_field(words: list[str], fields: dict[str, object]) -> None:
    assert parsed(*words) == SamplingParams(**fields)  # type: ignore[arg-type]


def test_every_field_has_an_option() -> None:
    @click.command()
    @sampling_options
    def command(params: SamplingParams) -> None:
        raise AssertionError

    names = {parameter.name for parameter in command.params}
    assert names >= {field.name for field in dataclasses.fields(SamplingParams)} - {"profile", "structured_outputs"}
    assert len(names) == len(command.params)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--max-tokens", "0"], "max_tokens is 0; expected at least 1"),
        (["--top-p", "1.5"], "top_p is 1.5; expected a number from 0 to 1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "warm"], "'warm' is not a valid float"),
        (["--seed", "-1"], "seed is -1, which vLLM reads as a random seed; expected"),
        (["--n", "129"], "n is 129; expected at most 128"),
        (["--min-tokens", "9", "--max-tokens", "5"], "min_tokens is 9 and max_tokens 5"),
        (["--stop", ""], "stop holds ''"),
        (["--stop", r"\d"], r"expected a backslash in \n, \r, \t or \\ only"),
        (["--stop", "a\\"], r"write \\ for a backslash"),
        (["--stop", "\\\n"], r"write \\ for a backslash"),
        (["--stop-token-ids", "1,x"], "'x' is not a valid integer"),
        (["--allowed-token-ids", ","], "got no value, expected at least one"),
        (["--logit-bias", "5"], "expected a token id and a number, such as 5=-100"),
        (["--logit-bias", "5=x"], "expected a token id and a number, such as 5=-100"),
        (["--logit-bias", "5=1,5=2"], "--logit-bias has two numbers for one token id"),
        (["--logit-bias", "5=101"], "expected a number from -100 to 100"),
        (["--acceptance", "greedy"], "'greedy' is not one of 'lossless', 'typical'"),
        (["--accept", "typical"], "Did you mean one of: '--acceptance', '--choice'?"),
        (["--typical-delta", "0.3"], "--typical-delta is an option of --acceptance typical"),
        (["--acceptance", "typical", "--typical-epsilon", "2"], "epsilon is 2.0, expected a probability"),
        (["--acceptance", "typical", "--temperature", "1"], "temperature is 1.0 with acceptance 'typical'"),
    ],
)
def test_what_is_refused_is_wrong_usage(words: list[str], reason: str) -> None:
    output = parsed(*words)
    assert isinstance(output, str)
    assert reason in " ".join(output.split())


def test_what_answers_have_to_match_is_read_from_files_and_options(tmp_path: Path) -> None:
    schema, grammar, binary = tmp_path / "schema.json", tmp_path / "grammar.lark", tmp_path / "binary"
    schema.write_text('\ufeff{"const": "é"}', encoding="utf-8")
    grammar.write_text('start: "a"', encoding="utf-8")
    binary.write_bytes(b"\xff\xfe")
    listed = tmp_path / "list.json"
    listed.write_text("[1, 2]", encoding="utf-8")
    for words, expected in (
        (["--json-schema", str(schema)], StructuredOutputs(json={"const": "é"})),
        (["--grammar", str(grammar)], StructuredOutputs(grammar='start: "a"')),
        (["--json-object"], StructuredOutputs(json_object=True)),
        (
            ["--json-schema", str(schema), "--disable-any-whitespace"],
            StructuredOutputs(json={"const": "é"}, disable_any_whitespace=True),
        ),
        (["--regex", "[a-z]+,?"], StructuredOutputs(regex="[a-z]+,?")),
        (["--choice", "a, b", "--choice", r"c\n"], StructuredOutputs(choice=["a, b", "c\n"])),
    ):
        params = parsed(*words)
        assert isinstance(params, SamplingParams) and params.structured_outputs == expected
    for words, reason in (
        (["--regex", "a", "--choice", "b"], "--regex does not go with --choice; leave out one of the two"),
        (["--json-schema", str(tmp_path / "none.json")], "does not exist"),
        (["--json-schema", str(grammar)], "--json-schema is not valid JSON"),
        (["--json-schema", str(listed)], "--json-schema is '[1, 2]', of type str; expected a JSON schema, an object"),
        (["--json-object", "--regex", "a"], "--json-object does not go with --regex"),
        (
            ["--regex", "a", "--disable-any-whitespace"],
            "--disable-any-whitespace needs --json-schema FILE or --json-obj",
        ),
        (["--draft", "auto", "--acceptance", "typical"], "draft is 'auto' with acceptance 'typical'"),
        (["--grammar", str(binary)], "is not UTF-8; expected a text file"),
        (["--regex", "a", "--acceptance", "typical"], "with acceptance 'typical'"),
    ):
        output = parsed(*words)
        assert isinstance(output, str) and reason in " ".join(output.split())
