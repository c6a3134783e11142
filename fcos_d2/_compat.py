"""The only file that knows that detectron2 0.6 and its main branch differ.

Both call themselves 0.6, so nothing here asks for a version.
"""

import logging

from detectron2.engine import DefaultTrainer

from .errors import InputError

logger = logging.getLogger(__name__)


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose checkpoints hold the optimizer (and the gradient scaler).

    0.6 leaves them out, so that ``--resume`` starts with empty momenta; main keeps them under
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
