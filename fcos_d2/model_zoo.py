"""Configs and published weights by name, with the API of ``detectron2.model_zoo``.

A name, such as "torchvision/fcos_R_50_FPN", is the path of a config in ``configs/`` without its
suffix; MODEL_ZOO.md lists them. MODEL.WEIGHTS "zoo://torchvision/fcos_R_50_FPN" loads the published
weights, which are downloaded on first use to iopath's cache ($FVCORE_CACHE, by default
~/.torch/iopath_cache).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir

from .errors import InputError, one_line_cause, suggest

PREFIX = "zoo://"
CONFIGS = Path(__file__).parent / "configs"
SUFFIXES = (".yaml", ".py")
TIMEOUT = 30.0  # seconds without a response after which a download fails


class Weights(NamedTuple):
    """Published weights; the file name in ``url`` ends with the first digits of its SHA-256."""

    url: str
    license: str


_MMDETECTION = "https://openmmlab.oss-cn-hangzhou.aliyuncs.com/mmdetection/v2.0/fcos"
_TRICKS = "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head"
_MMDETECTION_FILES = {
    "fcos_R_50_FPN_1x": "fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa",
    "fcos_R_101_FPN_1x": "fcos_r101_caffe_fpn_gn-head_1x_coco-0e37b982",
    "fcos_R_50_FPN_2x": "fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco-d92ceeea",
    "fcos_R_101_FPN_2x": "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6",
    "fcos_X_101_64x4d_FPN_2x": "fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8",
    "fcos_tricks_R_50_FPN_1x": f"{_TRICKS}_1x_coco-0a0d75a8",
    "fcos_tricks_dcnv2_R_50_FPN_1x": f"{_TRICKS}_dcn_1x_coco-ae4d8b3d",
}
# Weights under a permissive license. Those of AdelaiDet and of the original FCOS are for
# non-commercial use and no longer hosted; their files can still be loaded.
WEIGHTS = {
    "torchvision/fcos_R_50_FPN": Weights(
        "https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth", "BSD-3-Clause"
    ),
    **{
        f"mmdetection/{name}": Weights(
            f"{_MMDETECTION}/{file.rpartition('-')[0]}/{file}.pth", "Apache-2.0"
        )
        for name, file in _MMDETECTION_FILES.items()
    },
}


def names() -> list[str]:
    """Returns the names of all models in sorted order, without the template in configs/custom."""
    files = (path for suffix in SUFFIXES for path in CONFIGS.rglob(f"fcos_*{suffix}"))
    paths = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files)
    return sorted(path for path in paths if not path.startswith("custom/"))


def get_config_file(name: str) -> str:
    """Returns the path of the config ``name``, which may have a suffix, as in detectron2.

    Raises:
        InputError: there is no such config.
    """
    stem = _stem(name)
    for suffix in SUFFIXES:
        if (CONFIGS / f"{stem}{suffix}").is_file():
            return str(CONFIGS / f"{stem}{suffix}")
    raise InputError(f"the model zoo has no config {name!r}; {_suggest(stem, names())}")


def get_checkpoint_url(name: str) -> str:
    """Returns the URL of the published weights of ``name``.

    Raises:
        InputError: there are none.
    """
    return _weights(name).url


def get_config(name: str, trained: bool = False):
    """Returns the config ``name``: a CfgNode with all keys, or a LazyConfig.

    Args:
        name: name of a config.
        trained: set MODEL.WEIGHTS (``train.init_checkpoint``) to the published weights instead of
            those that training starts from.

    Raises:
        InputError: there is no such config, or it has no published weights.
    """
    from detectron2.config import LazyConfig

    from .config_file import read_cfg

    weights = f"{PREFIX}{_stem(name)}" if trained and _weights(name) else None
    path = get_config_file(name)
    if path.endswith(".py"):
        cfg = LazyConfig.load(path)
        cfg.train.init_checkpoint = weights or cfg.train.init_checkpoint
        return cfg
    return read_cfg(path, ["MODEL.WEIGHTS", weights] if weights else [])


def get(name: str, trained: bool = False, device: str | None = None) -> torch.nn.Module:
    """Builds the model ``name``, in training mode.

    Args:
        name: name of a config.
        trained: load the published weights; otherwise the model is initialized randomly, unlike
            in detectron2, which downloads the weights that training starts from.
        device: device of the model; None for the config's, or the CPU if there is no GPU.

    Raises:
        InputError: there is no such config, or its weights cannot be loaded.
    """
    from detectron2.config import CfgNode, instantiate

    from .checkpoint import Checkpointer
    from .config_file import choose_device
    from .inference import build_detector

    cfg = get_config(name, trained)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        choose_device(cfg)
        model, weights = build_detector(cfg), cfg.MODEL.WEIGHTS
    else:
        default = cfg.train.device if torch.cuda.is_available() else "cpu"
        model = instantiate(cfg.model).to(device or default)
        weights = cfg.train.init_checkpoint
    if trained:
        Checkpointer(model).load(weights)
    return model


def _stem(name: str) -> str:
    return name.removesuffix(".yaml").removesuffix(".py")


def _weights(name: str) -> Weights:
    if _stem(name) not in WEIGHTS:
        raise InputError(
            f"the model zoo has no weights of {name!r}; {_suggest(_stem(name), list(WEIGHTS))}"
        )
    return WEIGHTS[_stem(name)]


def _suggest(name: str, known: list[str]) -> str:
    in_folders = [other for other in known if other.rpartition("/")[2] == name]
    return suggest(name, known, f"available: {', '.join(known)}", in_folders)


# ---- Downloads ----


class ZooPathHandler(PathHandler):
    """Resolves ``zoo://NAME`` to the file of the published weights."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        """Returns the file of the weights, which is downloaded if necessary.

        Raises:
            InputError: there is no such model, or it cannot be downloaded.
        """
        url = get_checkpoint_url(path.removeprefix(PREFIX))
        target = Path(get_cache_dir(), urlparse(url).path.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):  # several processes may download at once
            if force or not target.is_file():
                download(url, target)
        return str(target)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)  # noqa: SIM115


def download(url: str, target: Path) -> None:
    """Downloads ``url``, whose file name contains its hash, atomically, with a progress bar.

    Raises:
        InputError: the download fails, or the hash differs.
    """
    digest = re.search(r"-([0-9a-f]{8,})\.\w+$", url)[1]
    try:
        with _timeout():
            torch.hub.download_url_to_file(url, str(target), hash_prefix=digest)
    except (OSError, HTTPException, RuntimeError) as error:
        cause = one_line_cause(error)
        if isinstance(error, RuntimeError):  # torch's message contains both hashes
            cause = "its SHA-256 differs from the one in its name"
        raise InputError(
            f"cannot download {url} ({cause}); try again, or download it elsewhere and save it as "
            f"{target}"
        ) from error


@contextmanager
def _timeout() -> Iterator[None]:
    """Sets the timeout of sockets, without which torch's download may wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


PathManager.register_handler(ZooPathHandler(), allow_override=True)
