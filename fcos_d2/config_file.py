"""Reads config files and command-line overrides, and reports mistakes as InputErrors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from . import model_zoo
from .checkpoint.reading import check_url
from .config import add_fcos_config, resolve_convention
from .config_values import check_values
from .data import count_classes, register_datasets
from .errors import InputError, one_line_cause, suggest
from .lazy_config import cfg_from_lazy, is_lazy


def read_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config, resolves its defaults, and registers its datasets; does not freeze it.

    Args:
        config_file: path of a YAML file or LazyConfig, name of a config in the model zoo, or "" for
            the defaults.
        opts: overrides, as KEY VALUE pairs; for a LazyConfig, also ``key=value``.

    Raises:
        InputError: a file, key or value is invalid, or a dataset that MODEL.FCOS.NUM_CLASSES
            depends on cannot be read.
    """
    check_opts(opts)
    cfg = get_cfg()
    add_fcos_config(cfg)
    config_file = find_config(config_file)
    if is_lazy(config_file):
        check_config_file(config_file)
        with _config_errors(cfg, "on the command line"):
            cfg = cfg_from_lazy(config_file, list(opts or []))
        check_values(cfg)
        return cfg
    if config_file:
        _merge_file(cfg, config_file)
    with _config_errors(cfg, "on the command line"):
        cfg.merge_from_list(list(opts or []))
    check_values(cfg)
    register_datasets(cfg.DATASETS.REGISTER)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if cfg.MODEL.FCOS.NUM_CLASSES is None and names:
        cfg.MODEL.FCOS.NUM_CLASSES = count_classes(names[0])
    return resolve_convention(cfg)


def find_config(path: str) -> str:
    """Returns the path of a config, given its path or its name in the model zoo."""
    is_name = path in model_zoo.names() and not PathManager.exists(path)
    return model_zoo.get_config_file(path) if is_name else path


def check_opts(opts: Sequence[object] | None) -> None:
    """Checks that argparse left no flag among the overrides."""
    for word in opts or ():
        if str(word).startswith("--"):
            raise InputError(f"{word} must come before the overrides, got it after {opts[0]}")


def check_config_file(path: str) -> None:
    """Checks that the config file exists."""
    if not PathManager.isfile(path):
        raise InputError(f"config file {path} does not exist; pass --config-file FILE")


class _CheckedYaml(CfgNode):
    """CfgNode that rejects a ``_BASE_`` whose download would be stored outside the cache."""

    @classmethod
    def _open_cfg(cls, filename: str):
        check_url(filename)
        return super()._open_cfg(filename)


def _merge_file(cfg: CfgNode, path: str) -> None:
    check_config_file(path)
    try:
        with _config_errors(cfg, f"in {path}"):
            # cfg.merge_from_file would let a YAML file call Python functions.
            cfg.merge_from_other_cfg(CfgNode(_CheckedYaml.load_yaml_with_base(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name} line {mark.line + 1} column {mark.column + 1}" if mark else path
        cause = getattr(error, "problem", None) or one_line_cause(error)
        raise InputError(f"{place}: {cause}; correct the YAML") from error
    except OSError as error:
        raise InputError(f"{path}: {one_line_cause(error)}; correct its _BASE_") from error
    except RecursionError as error:
        raise InputError(
            f"{path} has a circular _BASE_, or is nested too deeply; correct it"
        ) from error
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{path} is not a mapping of config keys ({one_line_cause(error)}); "
            "write it like the files in configs/"
        ) from error


@contextlib.contextmanager
def _config_errors(cfg: CfgNode, place: str) -> Iterator[None]:
    """Converts errors of yacs about a key or a value to InputErrors."""
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        message = str(error.args[0]) if error.args else type(error).__name__
        unknown = re.match(r"Non-existent (?:config )?key: (\S+)", message)
        mismatch = re.match(r"(?s)Type mismatch .* config key: (\S+)", message)
        if isinstance(error, UnicodeError):
            message = f"{one_line_cause(error)}; save it and its _BASE_ as UTF-8"
        elif unknown:
            message = f"unknown config key {unknown[1]}; {_suggest_key(cfg, unknown[1])}"
        elif mismatch:
            message = _describe_mismatch(cfg, mismatch[1], message)
        raise InputError(f"{place}: {' '.join(message.split())}") from error


def _suggest_key(cfg: CfgNode, key: str) -> str:
    known = list(_keys(cfg))
    last = key.rpartition(".")[2]
    # The same key in another section is a better suggestion than a similar name.
    in_other_sections = [name for name in known if name.rpartition(".")[2] == last]
    advice = "fcos_d2/config.py and detectron2/config/defaults.py list all keys"
    return suggest(key, known, advice, in_other_sections)


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _describe_mismatch(cfg: CfgNode, key: str, message: str) -> str:
    default = cfg
    for part in key.split("."):
        default = default[part]
    # "Type mismatch (<class 'int'> vs. <class 'str'>) with values (80 vs. ten) for config key: K"
    kind = re.search(r"vs\. <class '(?:.*\.)?(.*?)'>\)", message)
    value = message.rpartition(f"({default} vs. ")[2].rpartition(") for config key")[0]
    got = f"got {kind[1]} {value}" if kind else f"got {value}"
    if isinstance(default, CfgNode):
        example = next(iter(default), "NAME")
        return f"{key} is a section, {got}; set its keys, like {key}.{example}"
    if isinstance(default, (list, tuple)):
        example = default or type(default)(("one", "two"))
        advice = f"write it like {example}, in quotation marks in a shell"
    else:
        advice = f"write it like {default!r}"
    return f"{key} must be {type(default).__name__}, {got}; {advice}"


def choose_device(cfg: CfgNode) -> str | None:
    """Falls back to the CPU if the requested GPU is missing; returns a notice for the user."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return None
    notice = f"no GPU found: MODEL.DEVICE {cfg.MODEL.DEVICE} becomes cpu"
    cfg.MODEL.DEVICE = "cpu"
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "float16":  # unsuitable for CPUs
        amp.ENABLED = False
        notice += ", SOLVER.AMP.ENABLED becomes False"
    return notice
