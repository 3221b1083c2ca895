import shutil
from pathlib import Path

import pytest

from tests.data.corpus import make_data_set


@pytest.fixture(scope="session")
def raw_data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def zstd_data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("zstd"), compression="zstd")


@pytest.fixture
def data_set(raw_data_set: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(raw_data_set, tmp_path / "data"))
