"""``MODEL.WEIGHTS "timm://NAME"``: pretrained weights of a timm model for a TimmBackbone."""

from __future__ import annotations

import os

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir

from ..errors import InputError, suggest
from .timm_backbone import Blueprint, import_timm

PREFIX = "timm://"
PARAMETERS = "backbone.bottom_up.body."  # prefix of a TimmBackbone's parameters in the detector


class TimmWeights(PathHandler):
    """Converts weights downloaded by timm to a checkpoint of the detector's backbone.

    Weights are downloaded when the checkpoint is read, and only once: the file stays in iopath's
    cache ($FVCORE_CACHE, by default ~/.torch/iopath_cache).
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        """Returns the file for ``timm://NAME``; NAME is one of ``timm.list_pretrained()``.

        Raises:
            InputError: timm is not installed, or has no such weights.
            OSError: the download failed.
        """
        name = path.removeprefix(PREFIX)
        _check_name(name)
        file = os.path.join(get_cache_dir(), "timm", f"{name}.pth")
        if force or not os.path.isfile(file):
            weights = Blueprint(name, {}).create(pretrained=True).state_dict()
            weights = {
                PARAMETERS + key: tensor
                for key, tensor in weights.items()
                if not key.endswith(".num_batches_tracked")  # frozen norms have none
            }
            os.makedirs(os.path.dirname(file), exist_ok=True)
            torch.save({"model": weights}, f"{file}.{os.getpid()}")
            os.replace(f"{file}.{os.getpid()}", file)  # several processes may do this at once
        return file

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)  # noqa: SIM115


def _check_name(name: str) -> None:
    known = import_timm().list_pretrained()
    model = name.partition(".")[0]
    of_model = [weights for weights in known if weights.partition(".")[0] == model]
    if name in of_model or (of_model and name == model):  # a bare model name: its default weights
        return
    known, of_model = ([PREFIX + weights for weights in names] for names in (known, of_model))
    advice = suggest(path := PREFIX + name, known, "timm.list_pretrained() has all names", of_model)
    raise InputError(f"MODEL.WEIGHTS {path}: timm has no weights of this name; {advice}")


PathManager.register_handler(TimmWeights())
