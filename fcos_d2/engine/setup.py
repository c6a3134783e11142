"""The config of a training run, with its log files and random seeds."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config_file import choose_device, read_cfg
from ..data import prepare

logger = logging.getLogger(__name__)


def setup_cfg(args) -> CfgNode:
    """The frozen config of a run, with loggers and random seeds set up for it.

    Args:
        args: what ``default_argument_parser().parse_args()`` returns: the defaults are overridden
            by ``args.config_file``, and this by the KEY VALUE pairs in ``args.opts``.

    Raises:
        InputError: file, key, value or data set name that cannot be used.
    """
    cfg = read_cfg(args.config_file, args.opts)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            prepare(name)  # which says so, and what to do
    notice = choose_device(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fcos_d2")
    if notice:
        logger.warning(notice)
    return cfg
