"""What the tests of the command lines share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one token cache between the runs of this file."""
    return tmp_path_factory.mktemp("cache")
