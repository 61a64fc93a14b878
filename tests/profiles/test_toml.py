import numpy as np
import pytest
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.toml import from_toml, to_toml


def test_layout_is_one_path_a_line_indented_by_depth():
    profile = TreeProfile("small", ((0,), (0, 0), (1,)), 'a "quoted" source')
    assert to_toml(profile) == (
        'name = "small"\nsource = "a \\"quoted\\" source"\npaths = [\n    [0],\n      [0, 0],\n    [1],\n]\n'
    )


@pytest.mark.parametrize("source", ["", "plain", "back\\slash 'and' \"quotes\" = [1]", "käse – λ 𝛼"])
@pytest.mark.parametrize("paths", [(), ((0,),), ((0,), (0, 4095), (7,))])
def test_round_trip(paths, source):
    profile = TreeProfile("x", paths, source)
    assert from_toml(to_toml(profile), "x.toml") == profile


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_of_random_trees(seed):
    rng = np.random.default_rng(seed)
    paths = {tuple(row[:depth]) for row in rng.integers(0, 9, (30, 4)).tolist() for depth in range(1, 5)}
    profile = TreeProfile("random", tuple(paths))
    assert from_toml(to_toml(profile), "x.toml") == profile


def test_source_may_be_left_out():
    assert from_toml('name = "x"\npaths = [[0]]', "x.toml") == TreeProfile("x", ((0,),))


def test_what_ranks_refer_to_is_written_only_where_it_is_not_the_heads():
    heads, parents = (TreeProfile("x", ((0,), (0, 2)), candidates=what) for what in ("heads", "parents"))
    assert heads == TreeProfile("x", ((0,), (0, 2))) != parents
    assert "candidates" not in to_toml(heads)
    assert '\ncandidates = "parents"\n' in to_toml(parents)
    assert from_toml(to_toml(parents), "x.toml") == parents
    assert from_toml('name = "x"\ncandidates = "heads"\npaths = [[0], [0, 2]]', "x.toml") == heads


def test_windows_line_ends_are_read():
    profile = TreeProfile("x", ((0,), (0, 0)))
    assert from_toml(to_toml(profile).replace("\n", "\r\n"), "x.toml") == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paths = [", "not valid TOML: Invalid value"),
        ("paths = " + "[" * 5000, "not valid TOML: "),
        ("paths = [[" + "9" * 5000 + "]]", "not valid TOML: "),
        ('name = "x"', "key 'paths' is missing"),
        ("paths = []", "key 'name' is missing"),
        ("", "key 'name' is missing"),
        ('name = "x"\npaths = []\npath = 1', "unknown key 'path'; a tree has name, source, candidates, paths"),
        ('name = "x"\npaths = []\n[extra]', "unknown key 'extra'; a tree has name, source, candidates, paths"),
        ("name = 1\npaths = []", "a tree's name must be a string, got int 1"),
        ("name = 1979-05-27\npaths = []", "a tree's name must be a string, got date datetime.date(1979, 5, 27)"),
        ('name = "A"\npaths = []', "tree name 'A' is not allowed: "),
        ('name = "x"\nsource = 1\npaths = []', "tree 'x': source must be a string, got int 1"),
        ('name = "x"\ncandidates = 1\npaths = []', "tree 'x': candidates must be a string, got int 1"),
        (
            'name = "x"\ncandidates = "cousins"\npaths = []',
            "tree 'x': candidates is 'cousins'; expected one of 'heads', 'parents'",
        ),
        ('name = "x"\npaths = 1', "tree 'x': paths must be a list of lists of ranks, got int 1"),
        ('name = "x"\npaths = {}', "tree 'x': paths must be a list of lists of ranks, got dict {}"),
        ('name = "x"\npaths = [0]', "tree 'x': paths[0] must be a list of ranks, got int 0"),
        ('name = "x"\npaths = [[[0]]]', "tree 'x': paths[0][0] must be an integer, got list [0]"),
        ('name = "x"\npaths = [[true]]', "tree 'x': paths[0][0] must be an integer, got bool True"),
        (
            'name = "x"\npaths = [[0x' + "f" * 9999 + "]]",
            "tree 'x': paths[0][0] must be a rank from 0 to 4095, got a value too",
        ),
        ('name = "x"\npaths = [[0, 0]]', "tree 'x': path [0, 0] has no parent, add [0]"),
    ],
)
def test_bad_text_is_refused_with_its_origin(text, message):
    with pytest.raises(ProfileError) as caught:
        from_toml(text, "some/where.toml")
    assert str(caught.value).startswith(f"some/where.toml: {message}")


@pytest.mark.parametrize("key", ["a." * 50_000 + "a", "a . " * 50_000 + "a", '"a".' * 50_000 + "a"])
@pytest.mark.parametrize("form", ["{} = 1", "[{}]", "[[{}]]", "x = {{{} = 1}}"])
def test_a_key_of_many_parts_costs_no_time(key, form):
    """Python's parser would take hours."""
    with pytest.raises(ProfileError, match="line 2 has 50000 dots, at most 100 are allowed"):
        from_toml('name = "a"\n' + form.format(key), "a.toml")
    assert from_toml(f'name = "a"\nsource = "{"." * 80}"\npaths = [[0]]', "a.toml").size == 2
