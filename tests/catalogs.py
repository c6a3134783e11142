"""A fixture for the conftest.py of packages whose tests register datasets."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(autouse=True)
def catalogs_as_before():
    """Forgets the datasets that a test has registered."""
    before = [(catalog, set(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog) - names:
            del catalog[name]
