"""Token trees: topology, masks, the catalogue and search. Needs numpy and a TOML reader and writer only."""

from medusa_profiles.catalogue import load, load_file, names
from medusa_profiles.draw import draw
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import best_tree, expected_tokens
from medusa_profiles.toml import from_toml, to_toml

__all__ = [
    "ProfileError",
    "TreeProfile",
    "best_tree",
    "draw",
    "expected_tokens",
    "from_toml",
    "load",
    "load_file",
    "names",
    "to_toml",
]
