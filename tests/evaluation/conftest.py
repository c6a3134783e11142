"""The small COCO file of the tests of data."""

from tests.data.conftest import coco  # noqa: F401  a fixture
