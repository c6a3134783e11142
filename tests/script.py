"""Provides the fixture ``script``, which runs train_net.py in this process on tiny data.

Test modules request it with ``pytest_plugins = ["tests.script"]``.
"""

import logging
from types import SimpleNamespace

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import _cached_log_stream, setup_logger

import train_net
from fcos_d2 import add_fcos_config
from fcos_d2.engine import run_script

from .tiny_training import CONFIG, write_shapes


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory):
    """Registers the dataset "tiny_shapes"."""
    folder = tmp_path_factory.mktemp("tiny_shapes")
    register_coco_instances("tiny_shapes", {}, str(write_shapes(folder)), str(folder))
    yield
    DatasetCatalog.remove("tiny_shapes")
    MetadataCatalog.remove("tiny_shapes")


@pytest.fixture
def fcos_cfg():
    """Returns detectron2's default config with the keys of FCOS."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    return cfg


@pytest.fixture
def quiet_loggers():
    """Removes detectron2's log handlers, which refer to the test's captured stdout."""
    yield
    for name in ("detectron2", "fvcore", "fcos_d2"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    _cached_log_stream.cache_clear()  # by relative path, so all tests would share one file


@pytest.fixture
def script(tiny_shapes, quiet_loggers, tmp_path, monkeypatch, capsys):
    """Returns a function that runs train_net.py with a config file in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def call(*arguments, config="tiny.yaml"):
        words = ["--config-file", config, *map(str, arguments)]
        args = default_argument_parser().parse_args(words)
        results = []
        try:
            status = run_script(lambda args: results.append(train_net.main(args)), args)
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, results=results)

    call.folder = tmp_path
    return call
