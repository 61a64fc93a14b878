"""An output is resumed only behind responses to the same requests with the same bundle and parameters."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from medusa_exporter.batch.identity import BatchIdentity, line_id, seed_of
from medusa_exporter.batch.requests_file import BatchError, BatchRequest, read_requests
from medusa_exporter.batch.responses_file import Finished, ResponsesFile, count_finished, encode_line
from medusa_exporter.overwrite_check import OverwriteError
from medusa_runtime.errors import BusyError

from .batches import chat, write

IDENTITY = BatchIdentity("b" * 64, {"precision": "fp32", "parameters": {"max_tokens": 5, "logit_bias": {3: 1.0}}})
STATUSES = [200, 400, 200, 500]


@pytest.fixture
def requests(tmp_path: Path) -> list[BatchRequest]:
    file = write(tmp_path / "in.jsonl", [chat(name, f"question {name}") for name in "abcd"])
    return list(read_requests(file))


def responses(requests: list[BatchRequest], identity: BatchIdentity = IDENTITY) -> list[bytes]:
    return [
        encode_line(request, identity.request_id(request.data), status, {"text": "Grüße \ud800\n"})
        for request, status in zip(requests, STATUSES, strict=True)
    ]


def count(path: Path, requests: list[BatchRequest], identity: BatchIdentity = IDENTITY) -> Finished:
    return count_finished(path, path, iter(requests), identity)


def test_finished_lines_are_counted_wherever_the_last_one_was_cut(tmp_path: Path, requests: list[BatchRequest]) -> None:
    path, whole = tmp_path / "part", responses(requests)
    assert all(line.count(b"\n") == 1 for line in whole)
    for number in range(len(whole)):
        before = b"".join(whole[:number])
        for cut in range(len(whole[number]) + 1):
            path.write_bytes(before + whole[number][:cut])
            complete = number + (cut == len(whole[number]))
            found = count(path, requests)
            assert found.count == complete
            assert found.statuses == Counter(STATUSES[:complete])
            assert found.size == sum(map(len, whole[:complete]))
            assert found.is_whole == (cut in (0, len(whole[number])))


@pytest.mark.parametrize(
    "damage", [b"\x00" * 50, b"\x00" * 50 + b"\n", b'{"id": 1}\n', b"[]\n", b"{" * 9 + b"\n", b"\xff\n"]
)
def test_a_damaged_last_line_is_dropped_and_any_other_is_refused(
    tmp_path: Path, requests: list[BatchRequest], damage: bytes
) -> None:
    path, whole = tmp_path / "part", responses(requests)
    path.write_bytes(whole[0] + damage)
    assert count(path, requests) == Finished(Counter([200]), len(whole[0]), is_whole=False)
    path.write_bytes(whole[0] + damage.removesuffix(b"\n") + b"\n" + whole[1])
    with pytest.raises(BatchError, match=r"part:2 is damaged; give another output, or --force to start anew"):
        count(path, requests)


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (
            BatchIdentity("c" * 64, IDENTITY.settings),
            "part:1 is of another bundle, expected the response to line 1",
        ),
        (BatchIdentity(IDENTITY.bundle, {"precision": "int8"}), "another precision or other parameters"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, requests: list[BatchRequest], identity: BatchIdentity, reason: str
) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"".join(responses(requests)))
    with pytest.raises(BatchError, match=f"{reason}.*--force to answer all requests anew"):
        count(path, requests, identity)


def test_other_requests_are_refused(tmp_path: Path, requests: list[BatchRequest]) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"".join(responses(requests)))
    with pytest.raises(BatchError, match="part:2 is of another request, expected the response to line 3"):
        count(path, [requests[0], requests[2], requests[1], requests[3]])
    with pytest.raises(BatchError, match="has more responses than there are requests"):
        count(path, requests[:3])
    path.write_bytes(responses(requests)[0].replace(line_id("").encode(), b"batch-req-"))
    with pytest.raises(BatchError, match="part:1 is of something else"):
        count(path, requests)


@pytest.mark.parametrize("custom_id", ["other", "", None, 5])
def test_a_changed_custom_id_is_refused(tmp_path: Path, requests: list[BatchRequest], custom_id: object) -> None:
    path, lines = tmp_path / "part", responses(requests)
    content = json.loads(lines[2])
    lines[2] = json.dumps(content | {"custom_id": custom_id}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    reason = rf"part:3 is of the custom_id {custom_id!r} in place of 'c', expected the response to line 3"
    with pytest.raises(BatchError, match=reason):
        count(path, requests)
    del content["custom_id"]
    path.write_bytes(b"".join(lines[:2]) + json.dumps(content).encode() + b"\n")
    with pytest.raises(BatchError, match="part:3 is of the custom_id None in place of 'c'"):
        count(path, requests)


def test_an_id_depends_on_everything_and_a_seed_on_the_request() -> None:
    ids = {
        IDENTITY.request_id(b"a"),
        IDENTITY.request_id(b"b"),
        BatchIdentity("c" * 64, IDENTITY.settings).request_id(b"a"),
        BatchIdentity(IDENTITY.bundle, {**IDENTITY.settings, "sanitize": True}).request_id(b"a"),
    }
    assert len(ids) == 4
    assert IDENTITY.request_id(b"a") == IDENTITY.request_id(b"a")
    assert seed_of(b"a") == seed_of(b"a") != seed_of(b"b")
    assert all(0 <= seed_of(str(number).encode()) < 2**64 for number in range(100))


def test_what_is_up_to_date(tmp_path: Path, requests: list[BatchRequest]) -> None:
    output = ResponsesFile.at(tmp_path / "out.jsonl")
    assert output.is_up_to_date(requests, IDENTITY) is None
    output.path.touch()
    assert output.is_up_to_date(requests, IDENTITY) is None
    output.path.write_bytes(b"".join(responses(requests)))
    done = output.is_up_to_date(requests, IDENTITY)
    assert done is not None and done.statuses == Counter(STATUSES)
    output.part.touch()  # of a run with --force that was killed
    assert output.is_up_to_date(requests, IDENTITY) is None
    output.part.unlink()
    for content in (b"".join(responses(requests)[:3]), b"".join(responses(requests))[:-1]):
        output.path.write_bytes(content)
        with pytest.raises(BatchError, match="has 3 responses, expected one to each request"):
            output.is_up_to_date(requests, IDENTITY)


def test_files_of_the_users_are_refused(tmp_path: Path, requests: list[BatchRequest]) -> None:
    output = ResponsesFile.at(tmp_path / "out.jsonl")
    source, bundle = tmp_path / "in.jsonl", tmp_path / "bundle"
    for line in responses(requests)[:1]:
        for cut in range(len(line) + 1):
            output.part.write_bytes(line[:cut])
            output.check(inputs=[source], bundle=bundle)
    openai = b'{"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200}, "error": null}\n'
    for content in (openai, b"years of work", b'{"id"x'):
        output.part.write_bytes(content)
        with pytest.raises(OverwriteError, match=r"out\.jsonl\.part exists and was not written by medusa-export"):
            output.check(inputs=[source], bundle=bundle)
        output.part.unlink()
        output.path.write_bytes(content)
        with pytest.raises(OverwriteError, match=r"out\.jsonl exists and was not written by medusa-export"):
            output.check(inputs=[source], bundle=bundle)
        output.path.unlink()


def test_two_commands_do_not_write_to_one_output(tmp_path: Path) -> None:
    output = ResponsesFile.at(tmp_path / "deep" / "out.jsonl")
    code = (
        "import sys; from pathlib import Path\n"
        "from medusa_exporter.batch.responses_file import ResponsesFile\n"
        "with ResponsesFile.at(Path(sys.argv[1])).open_part() as file: file.write(b'x')\n"
    )
    other = [sys.executable, "-c", code, str(output.path)]
    with output.open_part() as file:
        done = subprocess.run(other, capture_output=True, text=True, check=False)
        assert "BusyError: another command is writing to" in done.stderr
        file.write(b"mine")
    assert output.part.read_bytes() == b"mine"
    with output.open_part() as file, pytest.raises(BusyError, match="or has just finished it"):
        output.publish(file)
        output._lock(file)
    assert output.path.read_bytes() == b"mine"
    assert [path.name for path in output.path.parent.iterdir()] == ["out.jsonl"]


def test_an_output_with_nothing_in_it_does_not_stay(tmp_path: Path) -> None:
    output = ResponsesFile.at(tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt), output.open_part():
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_explained(tmp_path: Path) -> None:
    output = ResponsesFile.at(tmp_path / "out.jsonl")
    kept = r"out\.jsonl\.part cannot be written as the output .*/out\.jsonl: {}; the responses that it has are kept: "
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with output.open_part() as file:
        output.append(file, b"a line\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(BatchError, match=kept.format("File too large")):
                output.append(file, b"another line\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert output.part.read_bytes() == b"a line\nano"  # of which the next run drops the end
    with output.open_part() as file:
        output.path.mkdir()
        with pytest.raises(BatchError, match=kept.format("Is a directory")):
            output.publish(file)
    (tmp_path / "file").touch()
    with (
        pytest.raises(BatchError, match=r"out\.jsonl\.part cannot be written .*(File exists|Not a directory)"),
        ResponsesFile.at(tmp_path / "file" / "out.jsonl").open_part(),
    ):
        pass


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    output = ResponsesFile.at(tmp_path / "out.jsonl")
    with (
        Path("/dev/full").open("ab", buffering=0) as full,
        pytest.raises(BatchError, match=r"\.part .*: No space left"),
    ):
        output.append(full, b"a line\n")


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "out.jsonl")
    output = ResponsesFile.at(tmp_path / "link")
    with output.open_part() as file:
        file.write(b"x")
        output.publish(file)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "out.jsonl").read_bytes() == b"x"
