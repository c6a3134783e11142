"""Fixtures: the small COCO file of the tests of data, and datasets that are forgotten."""

from tests.catalogs import restore_catalogs  # noqa: F401  a fixture
from tests.data.conftest import coco  # noqa: F401  a fixture
