"""Fixture for tests that register datasets."""

from tests.catalogs import restore_catalogs  # noqa: F401  a fixture
