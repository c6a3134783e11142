"""Reading weights: what does not fit is refused, with the tensors named."""

from __future__ import annotations

import logging
import pickle

from detectron2.checkpoint import DetectionCheckpointer

from ..errors import InputError, one_line_cause

CLASS_LAYER = "head.cls_logits."
MOST_SHOWN = 5  # tensors named in an error, the others are counted

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that refuses what does not fit, instead of training from noise.

    With ``reset_class_layer`` the class layer may be one of another number of classes; it keeps its
    initial values then, which is how a detector is trained on from one data set to another.
    """

    reset_class_layer = False

    def load(self, path: str, *args, **kwargs) -> dict:
        """See DetectionCheckpointer.

        Raises:
            InputError: no such file, a file that is no checkpoint, or weights that do not fit.
        """
        self._source = path
        try:
            return super().load(path, *args, **kwargs)
        except (AssertionError, OSError) as error:
            cause = one_line_cause(error)
            cause = "no such file" if "not found" in cause else cause
            raise InputError(
                f"cannot load weights from {path}: {cause}; set MODEL.WEIGHTS to an existing file"
            ) from error

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            cause = one_line_cause(error).partition(". ")[0]  # torch adds a page on what is safe
            raise InputError(
                f"{filename} is no checkpoint that can be read ({cause}); copy it again, or save "
                "its tensors alone with torch.save(model.state_dict(), FILE)"
            ) from error

    def _load_model(self, checkpoint: dict):
        incompatible = super()._load_model(checkpoint)
        if self.reset_class_layer:
            self._accept_other_classes(incompatible)
        if incompatible.incorrect_shapes:
            raise InputError(
                f"weights of {self._source} do not fit the model: "
                f"{_list_shapes(incompatible.incorrect_shapes)}; use the config they were trained "
                "with, or change MODEL.FCOS.NUM_CLASSES, MODEL.RESNETS or MODEL.FPN to match"
            )
        names = [name for name, _ in self.model.named_parameters()]
        if names and set(names) <= set(incompatible.missing_keys):
            raise InputError(
                f"{self._source} holds nothing for this model: it has no {names[0]}, but "
                f"{', '.join(incompatible.unexpected_keys[:2]) or 'nothing'}; set MODEL.WEIGHTS to "
                "weights of this architecture"
            )
        return incompatible

    def _accept_other_classes(self, incompatible) -> None:
        other = [
            (name, got, expected)
            for name, got, expected in incompatible.incorrect_shapes
            if name.startswith(CLASS_LAYER) and got[1:] == expected[1:]
        ]
        for entry in other:
            incompatible.incorrect_shapes.remove(entry)
            incompatible.missing_keys.remove(entry[0])
        if other:
            _, got, expected = other[0]
            logger.warning(
                f"{self._source} has {got[0]} classes and the model {expected[0]}: {CLASS_LAYER}* "
                "starts from its initial values, everything else is loaded"
            )


def _list_shapes(incorrect: list[tuple]) -> str:
    shown = [
        f"{name} expected {tuple(expected)}, got {tuple(got)}"
        for name, got, expected in incorrect[:MOST_SHOWN]
    ]
    more = len(incorrect) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
