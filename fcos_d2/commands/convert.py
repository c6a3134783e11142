"""Converts weights of other FCOS implementations to ours, or ours to theirs.

    fcos-d2 convert fcos_R_50.pth ours.safetensors
    fcos-d2 convert output/model_final.pth theirs.pth --to torchvision

OUT is written in the safetensors format if it ends in .safetensors, and by torch.save otherwise.
MODEL.WEIGHTS also takes weights of other implementations directly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import safetensors.torch
import torch

from ..checkpoint.adjustments import Weights
from ..checkpoint.conversion import (
    OURS,
    WRITABLE,
    export_weights,
    extract_weights,
    import_weights,
    is_ours,
)
from ..checkpoint.reading import load_safely, load_trusted
from ..checkpoint.requirements import Requirements
from ..checkpoint.saving import atomic_write
from ..errors import InputError, exit_status
from .arguments import DEFAULT, make_parser


def convert(source: str, target: str, format_name: str, trust_pickle: bool) -> None:
    """Converts ``source`` to ``target`` and prints the format that it recognized.

    Raises:
        InputError: a file cannot be read or written, or the format cannot express the weights.
    """
    weights, requirements, what = _read(source, trust_pickle)
    if format_name != OURS:
        if what is None:
            keys = ", ".join(list(weights)[:3])
            raise InputError(f"{source} is not a known FCOS: its first keys are {keys}")
        weights = export_weights(weights, format_name, requirements)
    _write(weights, target, is_bare=format_name == "torchvision")
    print(f"{source}: {what or 'not a known FCOS, copied unchanged'}")
    print(f"{target}: {len(weights)} tensors" + (f" for {format_name}" if what else ""))
    if requirements and format_name == OURS:
        print(f"use with: {_options(requirements)}")
    elif what and format_name != OURS:
        print(f"exact if all other settings match MODEL.FCOS.CONVENTION {format_name}")


def _read(source: str, trust_pickle: bool) -> tuple[Weights, Requirements | None, str | None]:
    """Returns the weights (renamed to ours if recognized), their requirements and a description."""
    try:
        checkpoint = (load_trusted if trust_pickle else load_safely)(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    try:
        recognized = import_weights(checkpoint)
        weights, _ = extract_weights(checkpoint)
    except InputError as error:
        raise InputError(f"{source} cannot be used: {error}") from error
    if recognized:
        conventions = " or ".join(recognized.requirements.conventions)
        what = f"recognized as {recognized.format}, convention {conventions}"
        return recognized.weights, recognized.requirements, what
    return weights, None, f"recognized as {OURS}" if is_ours(weights) else None


def _write(weights: Weights, target: str, is_bare: bool) -> None:
    """Writes the weights atomically; ``is_bare`` leaves out the "model" key."""
    try:
        with atomic_write(target) as file:
            if target.endswith(".safetensors"):  # which rejects tensors that share memory
                layout = torch.contiguous_format
                copies = {k: value.clone(memory_format=layout) for k, value in weights.items()}
                file.write(safetensors.torch.save(copies, {"format": "pt"}))
            else:
                torch.save(weights if is_bare else {"model": weights}, file)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


def _options(requirements: Requirements) -> str:
    """Formats the requirements as KEY VALUE pairs for a command line."""
    settings = {"MODEL.FCOS.CONVENTION": requirements.conventions[0], **requirements.settings}
    return " ".join(
        f'{key} "{value}"' if isinstance(value, list) else f"{key} {value}"
        for key, value in settings.items()
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="weights of any known FCOS implementation")
    add("target", metavar="OUT", help="file to write")
    add("--to", choices=(OURS, *WRITABLE), default=OURS, help=f"format of OUT {DEFAULT}")
    add(
        "--trust-pickle",
        action="store_true",
        help="run the code in IN to read it; only for files from a source you trust",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(convert, *vars(parse(arguments)).values())
