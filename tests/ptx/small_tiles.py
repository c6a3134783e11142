"""Copies csrc with small tiles, lists and blocks, so that small inputs reach every path."""

import re
from pathlib import Path

CONSTANTS = {
    "batched_nms.cu": {"kPaddedThreads": 256, "kWanted": 32, "kSortable": 160},
    "block.h": {"kBins": 256, "kBinBits": 8},
    "candidate_tiles.h": {
        "kScanThreads": 32,
        "kFinishThreads": 64,
        "kTileSize": 512,
        "kPointBits": 5,
        "kClassBits": 4,
        "kSortable": 64,
        "kCollectBlocks": 4,
        "kBinShift": 19,
    },
    "launch.h": {"kThreads": 64},
    "nms_step.h": {"kGroups": 4},
    "sigmoid_focal_loss.h": {"kMaxRows": 4},
    "sums.h": {"kTickets": 8},
}


def copy(csrc: Path, folder: Path) -> Path:
    """Writes the copy to ``folder``, leaving unchanged files alone; returns ``folder``."""
    for source in [*csrc.glob("core/*.h"), *csrc.glob("cuda/*")]:
        text = source.read_text()
        for name, value in CONSTANTS.get(source.name, {}).items():
            text, count = re.subn(rf"\b({name} = )\d+", rf"\g<1>{value}", text)
            assert count == 1, f"{source} defines {name} {count} times"
        target = folder / source.relative_to(csrc)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return folder
