"""Token trees for speculative decoding: topology, attention masks, shipped trees and the search for better ones.

Start with `load_profile`, which returns a shipped tree by name (`profile_names` lists them), or `load_profile_file` for
a tree of your own. A tree is a `TreeProfile`; `draw_tree` prints it. `best_tree` finds a tree for measured head
accuracies, and `expected_tokens` predicts its tokens per step. The package needs numpy and TOML only.
"""

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
