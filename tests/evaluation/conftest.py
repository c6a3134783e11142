"""Fixtures for a small COCO file and for tests that register datasets."""

from tests.catalogs import restore_catalogs  # noqa: F401  a fixture
from tests.data.conftest import coco  # noqa: F401  a fixture
