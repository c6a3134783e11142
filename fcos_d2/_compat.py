"""Hides the differences between detectron2 0.6 and its main branch from all other files.

Both report version 0.6, so features are detected instead of versions.
"""

import logging

import torch.distributed as dist
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose checkpoints contain the state of ``_trainer``, such as the optimizer.

    0.6 omits it, so ``--resume`` starts with empty momenta; main cannot resume from a checkpoint
    without it. This class writes main's format and reads both.
    """

    def state_dict(self) -> dict:
        return super(DefaultTrainer, self).state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super(DefaultTrainer, self).load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("the checkpoint has no optimizer state: momenta start from zero")


def create_local_process_group(size: int) -> None:
    """Tells ``detectron2.utils.comm`` that every machine runs ``size`` processes.

    0.6 does so only in its own launch(); main has a public function of this name.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
