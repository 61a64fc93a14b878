"""Versions of what is installed."""

from __future__ import annotations

import numpy as np
from medusa_exporter.package_versions import installed_versions


def test_it_leaves_out_what_is_not_installed() -> None:
    assert installed_versions(["numpy", "no-such-package-1"]) == {"numpy": np.__version__}
