"""`medusa-export inspect`: what it shows is what the bundle holds, checked first."""

import json

import pytest
from click.testing import CliRunner
from medusa_exporter.cli import main
from medusa_exporter.cli.inspect import command
from medusa_profiles.drawing import draw_tree
from medusa_runtime.bundle import Bundle, write_manifest
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.graph_check import GraphCheck


@pytest.fixture
def folder(tmp_path):
    files = {
        "graphs/ort-cpu-fp32.onnx": b"x" * 1_500,
        "graphs/ort-cpu-fp32.data": b"y" * 2_000_000,
        "graphs/ort-cuda-bf16.onnx": b"",
        "graphs/ort-cuda-fp16.onnx": b"",
        "graphs/ort-cuda-fp16-causal.onnx": b"",
        "profiles/a.toml": b'name = "a"\nsource = "by hand"\npaths = [[0], [1], [0, 0]]\n',
    }
    for name, data in files.items():
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(data)
    write_manifest(
        tmp_path / "b",
        producer={"medusa-export": "0.1.0", "torch": "2.13"},
        model=ModelFacts("tiny", "llama", 30, 576, 9, 3, 64, 49152, 8192, (2, 7)),
        heads=HeadFacts(3, 5, "root", 10, (20,), 1536, 16384),
        graphs={
            f"{backend}-{precision}": GraphFacts(backend, precision, f"graphs/{backend}-{precision}.onnx")
            for backend, precision in (("ort-cpu", "fp32"), ("ort-cuda", "bf16"), ("ort-cuda", "fp16"))
        },
        graph_checks={
            "graphs/ort-cpu-fp32.onnx": GraphCheck(("prefill", "tree"), 1e-6, 7.2e-6, 2e-6, 5e-5),
            "graphs/ort-cuda-fp16.onnx": GraphCheck(("tree",), 0.003, 0.001, 0.0, 0.02),
            "graphs/ort-cuda-fp16-causal.onnx": GraphCheck(not_run="no kernel"),
            "graphs/ort-cuda-bf16.onnx": GraphCheck(not_run="no kernel for bfloat16"),
        },
        profiles=["a"],
        sources={},
    )
    return tmp_path / "b"


def test_text(folder):
    result = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    for shown in (
        "tiny (llama): 30 layers, hidden size 576, 9 attention heads and 3 KV heads of 64",
        "vocabulary 49,152, context 8,192 tokens, ends at token 2 or 7",
        "46,080 bytes a token in fp32",
        "3 of 5 ResBlocks behind a gated block of 1,536",
        "they see the hidden state and what layer 20 reads and the root token; each ranks 10 of 16,384 tokens",
        "  ort-cpu-fp32   1.5 kB   graphs/ort-cpu-fp32.onnx   by default with plain  differs by 7.2e-06, at most 5e-05",
        "  ort-cuda-bf16  0 bytes  graphs/ort-cuda-bf16.onnx  by default with plain  not compared with the model: no "
        "kernel for bfloat16",
        "differs by 3.0e-03, at most 2e-02 allowed (1 of 2 files run)",
        "  a  4 nodes  depth 2",
        f"  total{' ' * 29}2.0 MB",
        "  torch          2.13",
    ):
        assert shown in result.output, shown


def test_json(folder):
    facts = json.loads(CliRunner().invoke(command, [str(folder), "--json"], catch_exceptions=False).output)
    assert facts["model"]["kv_heads"] == 3 and facts["model"]["eos_token_ids"] == [2, 7]
    assert facts["kv_bytes_per_token"] == {"fp32": 46_080}
    assert facts["graphs"]["ort-cpu-fp32"]["size"] == 1_500
    assert facts["graph_checks"]["graphs/ort-cpu-fp32.onnx"] == {
        "steps": ["prefill", "tree"],
        "logits": 1e-6,
        "keys": 7.2e-6,
        "values": 2e-6,
        "limit": 5e-5,
        "not_run": "",
    }
    assert facts["profiles"] == {"a": {"nodes": 4, "depth": 2, "source": "by hand"}}
    assert facts["size"] == sum(facts["files"].values()) == 2_001_500 + len((folder / "profiles/a.toml").read_bytes())
    assert facts["digest"] == Bundle.open(folder).manifest.digest


def test_profile(folder):
    result = CliRunner().invoke(command, [str(folder), "--profile", "a"], catch_exceptions=False)
    assert result.output == draw_tree(Bundle.open(folder).profile("a")) + "\n"
    result = CliRunner().invoke(command, [str(folder), "--profile", "a", "--json"], catch_exceptions=False)
    assert json.loads(result.output) == {"name": "a", "paths": [[0], [0, 0], [1]]}


def test_failures_are_one_line(folder, capsys):
    (folder / "graphs/ort-cpu-fp32.data").write_bytes(b"z" * 2_000_000)
    for arguments in ([str(folder)], [str(folder / "absent")]):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        assert stopped.value.code == 1
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
