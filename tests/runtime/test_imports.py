"""What the runtime may load, and who may import whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx.parser

FORBIDDEN = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "medusa_exporter"}
ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = sys.argv[1]
for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""

# A step over four tokens, two heads and two candidates each. A row of the past is (token, position) as key and
# (token * position, token squared * position) as value; the next token follows from the sum of all rows seen; the
# hidden state is the candidates themselves.
GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
step (int32[1,T] input_ids, int32[1,T] position_ids, bool[1,T,T] tree_mask, int32[1] past_length,
      float[N,4] draft_hidden, int32[1,R] logit_rows, float[1,1,C,2] past_key_0, float[1,1,C,2] past_value_0)
  => (int32[1,T] tokens, int32[1,R] argmax, float[1,R,4] logits, float[1,T,4] hidden,
      float[1,1,C,2] present_key_0, float[1,1,C,2] present_value_0)
<int32 zero = {0}, int32 plus_one = {1}, int32 minus_one = {-1},
 int64[1] first = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[4] as_rows = {1, 1, -1, 1},
 float[1,4] nothing = {0, 0, 0, 0}, float[4,1] weights = {1, 3, 2, 5}, float prime = {61}, float four = {4},
 float[1,1,4] offsets = {1, 2, 2, 3}, float[1,1,4] vocabulary = {0, 1, 2, 3}>
{
    literal = GreaterOrEqual(input_ids, zero)
    drafts = Concat<axis = 0>(draft_hidden, nothing)
    draft = Slice(drafts, first, one, first)
    proposed = Cast<to = 6>(draft)
    number = Sub(minus_one, input_ids)
    index = Where(literal, zero, number)
    candidate = GatherElements<axis = 1>(proposed, index)
    tokens = Where(literal, input_ids, candidate)
    flat_token = Cast<to = 1>(tokens)
    flat_position = Cast<to = 1>(position_ids)
    token = Unsqueeze(flat_token, two)
    position = Unsqueeze(flat_position, two)
    product = Mul(token, position)
    square = Mul(product, token)
    key_rows = Concat<axis = 2>(token, position)
    value_rows = Concat<axis = 2>(product, square)
    rows = Concat<axis = 2>(key_rows, value_rows)
    new_key = Unsqueeze(key_rows, one)
    new_value = Unsqueeze(value_rows, one)
    count_shape = Shape<start = 1, end = 2>(input_ids)
    count_rows = Squeeze(count_shape)
    count = Cast<to = 6>(count_rows)
    node = Range(zero, count, plus_one)
    place = Add(node, past_length)
    wide_place = Cast<to = 7>(place)
    column = Reshape(wide_place, as_rows)
    new_shape = Shape(new_key)
    at = Expand(column, new_shape)
    present_key_0 = ScatterElements<axis = 2>(past_key_0, at, new_key)
    present_value_0 = ScatterElements<axis = 2>(past_value_0, at, new_value)
    past_of_head = Concat<axis = 3>(past_key_0, past_value_0)
    past = Squeeze(past_of_head, one)
    past_shape = Shape<start = 2, end = 3>(past_key_0)
    past_rows = Squeeze(past_shape)
    past_end = Cast<to = 6>(past_rows)
    row = Range(zero, past_end, plus_one)
    length = Unsqueeze(past_length, one)
    is_real = Less(row, length)
    real = Cast<to = 1>(is_real)
    real_column = Unsqueeze(real, two)
    real_past = Mul(past, real_column)
    past_sum = ReduceSum(real_past, one)
    mask = Cast<to = 1>(tree_mask)
    new_sum = MatMul(mask, rows)
    sum = Add(new_sum, past_sum)
    state = MatMul(sum, weights)
    residue = Mod<fmod = 1>(state, prime)
    next = Mod<fmod = 1>(residue, four)
    shifted = Add(next, offsets)
    hidden = Mod<fmod = 1>(shifted, four)
    next_token = Squeeze(next, two)
    wanted = GatherElements<axis = 1>(next_token, logit_rows)
    argmax = Cast<to = 6>(wanted)
    wanted_column = Unsqueeze(wanted, two)
    same = Equal(wanted_column, vocabulary)
    logits = Cast<to = 1>(same)
}
"""

DECODE = """
import json, sys
from pathlib import Path
from medusa_profiles import TreeProfile
from medusa_runtime.accept import Typical
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.decoder import Decoder
from medusa_runtime.facts import HeadFacts, ModelFacts

model = ModelFacts("toy", "toy", 1, 4, 1, 1, 2, 4, 4096, ())
backend = OrtCpuBackend(Path(sys.argv[1]), model, HeadFacts(2, 1, "none", 2), threads=1)
decoder = Decoder(backend)
trees = [
    TreeProfile.plain(),
    TreeProfile("bushy", ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))),
    TreeProfile("sparse", ((1,), (1, 1))),
    TreeProfile("wide", ((0,), (1,))),  # of one size with the last: only mask, positions and ids differ
]
answers, steps = [], []
for prompt in ([3, 1, 2], [n * n % 4 for n in range(259)]):
    for tree in trees:
        decoder.set_profile(tree)
        decoder.start(prompt, 300)
        while decoder.sequence.finish_reason is None:
            decoder.step()
        answers.append(decoder.sequence.answer)
        steps.append(decoder.steps)
decoder.accept = Typical()
decoder.start([1], 10)
decoder.step()
refused = []
decoder.start([1] * 20, 50)
backend.allocate(1, 8)  # behind the back of the cache that has it
for work in (decoder.step, lambda: decoder.start([1] * 20)):
    try:
        work()
    except RuntimeError as error:
        refused.append(str(error))
print(json.dumps({"answers": answers, "steps": steps, "refused": refused, "modules": sorted(sys.modules)}))
"""


def python(script, *arguments):
    """What a script prints as JSON in a process of its own, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded(modules):
    """The top-level packages among modules."""
    return {name.partition(".")[0] for name in modules}


def literal_answer(prompt, count):
    """What the graph's model says after a prompt, worked out with whole numbers."""
    tokens = list(prompt)
    for _ in range(count):
        state = sum(t + 3 * p + 2 * t * p + 5 * t * t * p for p, t in enumerate(tokens))
        tokens.append(state % 61 % 4)
    return tokens[len(prompt) :]


def literal_steps(answer, first, second):
    """Steps that an answer takes where `first` and `second` are what each head's token may add to the root."""
    steps, root = 0, 0
    while root < len(answer) - 1:
        behind = [(token - answer[root]) % 4 for token in answer[root + 1 : root + 3]]
        root += 1 + (behind[:1] in first) * (1 + (behind[1:] in second))
        steps += 1
    return steps


def test_importing_the_whole_runtime_loads_no_part_of_the_exporter_and_no_backends_library():
    modules = python(IMPORT_ALL, "medusa_runtime")
    files = (ROOT / "runtime" / "medusa_runtime").rglob("*.py")
    names = {".".join(file.relative_to(ROOT / "runtime").with_suffix("").parts) for file in files}
    assert {name.removesuffix(".__init__") for name in names} <= set(modules)  # really all of them
    assert not loaded(modules) & (FORBIDDEN | {"onnxruntime"})


def test_importing_profiles_loads_no_runtime():
    assert not loaded(python(IMPORT_ALL, "medusa_profiles")) & (FORBIDDEN | {"medusa_runtime", "onnxruntime"})


def test_decoding_with_onnx_runtime_loads_no_more_than_it(tmp_path):
    model = onnx.parser.parse_model(GRAPH)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "step.onnx"
    onnx.save(model, path)
    result = python(DECODE, path)
    assert "onnxruntime" in loaded(result["modules"])
    assert not loaded(result["modules"]) & FORBIDDEN
    expected_answers, expected_steps = [], []
    for prompt in ([3, 1, 2], [n * n % 4 for n in range(259)]):
        answer = literal_answer(prompt, 300)
        expected_answers += [answer] * 4
        for first, second in (([], []), ([[1], [2]], [[2], [3]]), ([[2]], [[3]]), ([[1], [2]], [])):
            expected_steps.append(literal_steps(answer, first, second))
    assert result["answers"] == expected_answers
    assert result["steps"] == expected_steps
    assert result["refused"] == [
        "23 rows do not fit an arena of 8; allocate a larger one first",
        "20 rows do not fit an arena of 8; allocate a larger one first",
    ]
    assert expected_steps[0] == 299 and expected_steps[1] < 200


def test_exporter_imports_runtime_imports_profiles_and_never_the_other_way():
    environment = {**os.environ, "NO_COLOR": "1"}
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", script, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
