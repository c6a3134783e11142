"""Fixture for tests that register datasets."""

from tests.catalogs import catalogs_as_before  # noqa: F401  a fixture
