"""The only file that knows that detectron2 0.6 and its main branch differ.

Both call themselves 0.6, so nothing here asks for a version.
"""

import logging

import torch.distributed as dist
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from .errors import InputError

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose checkpoints hold the optimizer, and all else that ``_trainer`` saves.

    0.6 leaves it out, so that ``--resume`` starts with empty momenta; main keeps it under
    "_trainer" and cannot resume from a checkpoint without it. This writes what main writes, reads
    both, and is the same code on both: it goes past DefaultTrainer to TrainerBase.
    """

    def state_dict(self) -> dict:
        return super(DefaultTrainer, self).state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super(DefaultTrainer, self).load_state_dict(state_dict)
        if "_trainer" not in state_dict:
            logger.warning("the checkpoint holds no optimizer state: momenta start from zero")
            return
        saved, ours = state_dict["_trainer"], self.optimizer.state_dict()
        # Adam-like and SGD-like states load into each other without a word and fail a step later.
        same_kind = _is_adam(saved["optimizer"]) == _is_adam(ours)
        try:
            if not same_kind:
                raise ValueError("it is the state of another kind of optimizer")
            self._trainer.load_state_dict(saved)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"--resume: the checkpoint's optimizer does not fit ({error}); use the config that "
                "wrote it, or train without --resume and set MODEL.WEIGHTS to the checkpoint"
            ) from error


def _is_adam(optimizer_state: dict) -> bool:
    return any("betas" in group for group in optimizer_state["param_groups"])


def create_local_process_group(size: int) -> None:
    """Tells ``detectron2.utils.comm`` which processes are on this machine: ``size`` on each.

    0.6 does that in its own launch() alone; main has a function of this name for all others.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
