"""`--revision` of models and heads on the hub, with a local server that answers as the hub does."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from medusa_exporter import hub
from medusa_exporter.build_inputs import describe_inputs
from medusa_exporter.heads import files
from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.models import ModelSource
from medusa_runtime.errors import UnsupportedModelError

COMMIT = {"main": "a" * 40, "v2": "b" * 40}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `folders["owner/name"][revision]` at the paths of the hub, and counts what is asked of which revision."""

    folders: ClassVar[dict[str, dict[str, Path]]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        revisions = self.folders.get("/".join(parts[:2]), {})
        if len(parts) < 5 or parts[2] != "resolve":
            self.send_error(404)
            return
        self.asked.append((parts[3], parts[4]))
        named = {COMMIT[name]: folder for name, folder in revisions.items()} | revisions
        if parts[3] not in named:
            self.refuse("RevisionNotFound")
            return
        path = named[parts[3]] / "/".join(parts[4:])
        if not path.is_file():
            self.refuse("EntryNotFound")
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT.get(parts[3], parts[3]))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def run(tiny_model, tiny_heads, tmp_path):
    """Run medusa-export against a hub with owner/model and owner/heads, whose main branches are of no use."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "unknown"}')
    Hub.folders = {
        "owner/model": {"main": empty, "v2": tiny_model},
        "owner/heads": {"main": empty, "v2": tiny_heads},
    }
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }

    def call(*arguments):
        command = [sys.executable, "-m", "medusa_exporter", *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)

    yield call
    server.shutdown()
    server.server_close()


def test_a_bundle_is_built_from_a_revision(run, tmp_path):
    pinned = ("build", "owner/model", "--revision", "v2", "--heads", "owner/heads", "--heads-revision", "v2")
    output = ("-o", tmp_path / "bundle", "--profile", "chain-1")
    done = run(*pinned, *output)
    assert done.returncode == 0, done.stderr[-2000:]
    sources = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["sources"]
    assert sources["model"] == {"hub": "owner/model", "revision": "v2"}
    assert sources["heads"] == {"hub": "owner/heads", "revision": "v2"}
    again = run(*pinned, *output)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "is up to date" in again.stdout + again.stderr
    other = run("build", "owner/model", "--heads", "owner/heads", "--heads-revision", "v2", *output)
    assert other.returncode == 1  # the main branch is another model, so the bundle is not up to date
    assert "model type 'unknown'" in other.stderr


def test_a_revision_that_does_not_exist_is_named(run, tmp_path):
    heads = run("heads", "convert", "owner/heads", "--revision", "v9", "-o", tmp_path / "heads")
    assert heads.returncode == 1
    assert "owner/heads: the hub repository has no revision 'v9'; expected a branch, tag or commit" in heads.stderr
    model = run("distill", "owner/model", "--revision", "v9", "--synthesize", 1, "-o", tmp_path / "data")
    assert model.returncode == 1
    assert "owner/model@v9: " in model.stderr
    assert "expected a branch, tag or commit" in model.stderr
    assert "Traceback" not in heads.stderr + model.stderr


def test_heads_are_converted_from_a_revision(run, tmp_path):
    done = run("heads", "convert", "owner/heads", "--revision", "v2", "-o", tmp_path / "heads")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "heads" / "medusa_lm_head.safetensors").is_file()
    assert {revision for revision, _ in Hub.asked} == {"v2"}


def test_a_revision_of_something_local_is_refused(tiny_model, tiny_heads, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'v2' was given for a local folder; expected a hub name"):
        ModelSource.resolve(str(tiny_model), "v2")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"for a local file; .* leave out --revision"):
        ModelSource.resolve(str(gguf), "main")
    with pytest.raises(UnsupportedModelError, match="--heads-revision 'v2' was given for a local folder"):
        hub.pin_revision(str(tiny_heads), "v2")
    with pytest.raises(UnsupportedModelError, match="--revision is empty"):
        ModelSource.resolve("owner/name", " ")


def test_what_a_revision_becomes(monkeypatch, tmp_path):
    source = ModelSource.resolve("owner/name", "refs/pr/1")
    assert source.load_arguments == {"trust_remote_code": False, "revision": "refs/pr/1"}
    assert (source.name, source.described) == ("owner/name", "owner/name@refs/pr/1")
    assert ModelSource.resolve("owner/name").load_arguments == {"trust_remote_code": False}
    heads = hub.pin_revision("owner/heads", "v1.0")
    inputs = [describe_inputs(one, heads, (), ()) for one in (source, ModelSource.resolve("owner/name"))]
    assert inputs[0]["model"] == {"hub": "owner/name", "revision": "refs/pr/1"}
    assert inputs[1]["model"] == {"hub": "owner/name"}
    assert inputs[0]["heads"] == {"hub": "owner/heads", "revision": "v1.0"}
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        shutil.copy(__file__, tmp_path / "file")
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert files.hub_file(heads, "config.json") == tmp_path / "file"
    assert asked == [("owner/heads", "config.json", "v1.0")]
    with pytest.raises(HeadsError, match="not a hub name"):
        files.hub_file("owner@v1", "config.json")
