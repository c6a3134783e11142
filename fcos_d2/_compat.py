"""The only file that knows that detectron2 0.6 and its main branch differ.

Both call themselves 0.6, so nothing here asks for a version.
"""

import logging

import torch.distributed as dist
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose checkpoints hold what ``_trainer`` saves, like the optimizer.

    0.6 leaves it out, so that ``--resume`` starts with empty momenta; main cannot resume from a
    checkpoint without it. This writes what main writes and reads both.
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
    """Tells ``detectron2.utils.comm`` which processes are on this machine: ``size`` on each.

    0.6 does that in its own launch() only; main has a function of this name for all others.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
