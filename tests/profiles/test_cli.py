import json

import pytest
from click.testing import CliRunner
from medusa_exporter.cli import main
from medusa_exporter.cli.profiles import command
from medusa_profiles import ProfileError, TreeProfile, draw_tree, load_profile, profile_names, to_toml


def run(*arguments):
    return CliRunner().invoke(command, arguments)


def test_the_list_has_one_aligned_line_a_tree():
    result = run()
    assert result.exit_code == 0
    header, *lines = result.output.splitlines()
    assert header.split() == ["name", "nodes", "depth", "max", "rank", "source"]
    assert [line.split()[0] for line in lines] == list(profile_names())
    start = header.index("source")
    for line in lines:
        profile = load_profile(line.split()[0])
        assert line.split()[1:4] == [str(profile.size), str(profile.depth), str(profile.max_rank)]
        assert line[start:] == profile.source


def test_the_list_as_json():
    entries = json.loads(run("--json", "-").stdout)["profiles"]
    assert [entry["name"] for entry in entries] == list(profile_names())
    chosen = next(entry for entry in entries if entry["name"] == "mc_sim_7b_63")
    assert chosen == {
        "name": "mc_sim_7b_63",
        "nodes": 64,
        "depth": 4,
        "max_rank": 9,
        "source": load_profile("mc_sim_7b_63").source,
    }


def test_a_name_is_drawn_with_its_source():
    profile = load_profile("tree-8")
    assert run("tree-8").output == f"{draw_tree(profile)}\n{profile.source}\n"


def test_a_file_is_drawn_and_given_as_json(tmp_path):
    profile = TreeProfile("mine", ((0,), (0, 0)))
    path = tmp_path / "file.toml"
    path.write_text(to_toml(profile), encoding="utf-8")
    assert run(str(path)).output == f"{draw_tree(profile)}\n"
    content = json.loads(run(str(path), "--json", "-").stdout)
    assert (content["candidates"], content["paths"]) == ("heads", [[0], [0, 0]])


def test_an_unknown_name_is_an_error():
    result = run("tree-9")
    assert isinstance(result.exception, ProfileError)
    assert result.output == ""


@pytest.mark.parametrize("name", ["tree-9", "missing.toml"])
def test_the_command_line_tells_an_error_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["profiles", name])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert name in error
    assert error.count("\n") == 1
