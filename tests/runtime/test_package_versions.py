"""Old versions are refused by number, not by text."""

import pytest
from medusa_runtime.errors import MissingExtraError
from medusa_runtime.package_versions import check_version


def test_versions_are_compared_by_number() -> None:
    for version in ("1.9", "1.9.0", "1.10.2", "2.0.0rc1"):
        check_version("paper", version, (1, 9), "pip install paper")
    for version in ("1.8.9", "0.10"):
        expected = rf"^paper {version} is too old, it tears; expected 1\.9 or newer: pip install paper$"
        with pytest.raises(MissingExtraError, match=expected):
            check_version("paper", version, (1, 9), "pip install paper", "it tears; ")
