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


def graph(*weights):
    """An ONNX file that refers to weights: (file, offset, length) each."""
    import onnx

    tensors = []
    for number, (file, offset, length) in enumerate(weights):
        tensor = onnx.TensorProto(
            name=str(number), data_type=onnx.TensorProto.UINT8, dims=[length], data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", file), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)).SerializeToString()


@pytest.fixture
def folder(tmp_path):
    own, shared = ("ort-cpu-fp32.data", 0, 2_000_000), ("shared.data", 100, 50_000)
    files = {
        "graphs/ort-cpu-fp32.onnx": graph(own, shared),
        "graphs/ort-cpu-fp32.data": b"y" * 2_000_000,
        "graphs/ort-cuda-bf16.onnx": graph(),
        "graphs/ort-cuda-fp16.onnx": graph(shared),
        "graphs/ort-cuda-fp16-causal.onnx": graph(shared, ("shared.data", 60_000, 3_000)),
        "graphs/shared.data": b"z" * 70_000,
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
    size = sum(facts.size for facts in Bundle.open(folder).manifest.files.values())
    assert f"{folder}: {size / 1e6:.1f} MB; every file matches the manifest" in result.output
    for shown in (
        "tiny (llama): 30 layers, hidden size 576",
        "9 attention heads and 3 KV heads of size 64",
        "vocabulary of 49,152 tokens, context of 8,192 tokens",
        "end tokens: 2, 7",
        "46,080 bytes per token in fp32",
        "3 heads of 5 residual blocks after a gated block of width 1,536",
        "inputs: the hidden state, the input of layer 20, the token that the model has chosen",
        "each proposes 10 of 16,384 tokens",
    ):
        assert shown in result.output, shown
    listed = Bundle.open(folder).manifest.files
    causal = sum(listed[f"graphs/ort-cuda-fp16{kind}.onnx"].size for kind in ("", "-causal"))
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for shown in (
        "graph size of which shared default tree difference from the model",
        "ort-cpu-fp32 2.1 MB 50.0 kB plain 7.2e-06 (limit 5e-05)",
        f"ort-cuda-bf16 {len(graph())} bytes none plain not measured: no kernel for bfloat16",
        f"ort-cuda-fp16 {(53_000 + causal) / 1e3:.1f} kB 50.0 kB plain 3.0e-03 (limit 2e-02; 1 of 2 files measured)",
        "a 4 2",
        "torch 2.13",
        "graphs/shared.data 70.0 kB",
    ):
        assert shown in lines, shown


def test_json(folder):
    facts = json.loads(CliRunner().invoke(command, [str(folder), "--json", "-"], catch_exceptions=False).stdout)
    assert facts["model"]["kv_heads"] == 3 and facts["model"]["eos_token_ids"] == [2, 7]
    assert facts["kv_bytes_per_token"] == {"fp32": 46_080}
    assert facts["graphs"]["ort-cpu-fp32"]["size"] == 2_050_000 + facts["files"]["graphs/ort-cpu-fp32.onnx"]
    assert facts["graph_checks"]["graphs/ort-cpu-fp32.onnx"] == {
        "steps": ["prefill", "tree"],
        "logits": 1e-6,
        "keys": 7.2e-6,
        "values": 2e-6,
        "limit": 5e-5,
        "not_run": "",
    }
    assert facts["profiles"] == {"a": {"nodes": 4, "depth": 2, "source": "by hand"}}
    assert facts["size"] == sum(facts["files"].values())
    sizes = facts["graphs"]["ort-cuda-fp16"]
    assert (sizes["weights_size"], sizes["shared_weights_size"]) == (53_000, 50_000)
    names = ("graphs/ort-cuda-fp16.onnx", "graphs/ort-cuda-fp16-causal.onnx")
    assert sizes["size"] == 53_000 + sum(facts["files"][name] for name in names)
    assert facts["digest"] == Bundle.open(folder).manifest.digest


def test_profile(folder):
    result = CliRunner().invoke(command, [str(folder), "--profile", "a"], catch_exceptions=False)
    assert result.output == draw_tree(Bundle.open(folder).profile("a")) + "\n"
    result = CliRunner().invoke(command, [str(folder), "--profile", "a", "--json", "-"], catch_exceptions=False)
    content = json.loads(result.stdout)
    assert content == {"made_by": "medusa-export inspect --json", "name": "a", "paths": [[0], [0, 0], [1]]}


def test_failures_are_one_line(folder, capsys):
    (folder / "graphs/ort-cpu-fp32.data").write_bytes(b"z" * 2_000_000)
    for arguments in ([str(folder)], [str(folder / "absent")]):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        assert stopped.value.code == 1
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
