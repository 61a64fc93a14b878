"""Token trees: topology, masks, the catalogue and search. Needs numpy and a TOML reader and writer only."""

from medusa_profiles.catalogue import load_profile, load_profile_file, profile_names
from medusa_profiles.drawing import draw_tree
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import best_tree, expected_tokens
from medusa_profiles.toml import from_toml, to_toml

__all__ = [
    "ProfileError",
    "TreeProfile",
    "best_tree",
    "draw_tree",
    "expected_tokens",
    "from_toml",
    "load_profile",
    "load_profile_file",
    "profile_names",
    "to_toml",
]
