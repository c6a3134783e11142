"""Tests the analyze command against published counts and counts by hand."""

from pathlib import Path

from fcos_d2.commands import analyze

ROOT = Path(__file__).parents[2]


def values(capsys, *words):
    """Returns the output, and the lines below the table by their first word."""
    config, *rest = words
    assert analyze.main(["--config-file", str(ROOT / "configs" / config), *rest]) == 0
    text = capsys.readouterr().out
    lines = text.rpartition("|\n")[2].strip().splitlines()
    return text, {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_fcos_r50_has_the_published_number_of_parameters(capsys):
    """tianzhi0549/FCOS and AdelaiDet have 32,244,250, of which 32,021,850 are trainable."""
    options = ("--size", "100", "130", "MODEL.FCOS.NUM_CLASSES", "80")
    table, found = values(capsys, "fcos_R_50_FPN_1x.yaml", *options)
    assert found["parameters"] == "32,244,250, trainable 32,021,850"
    assert found["network"].startswith("input 128 x 160")
    # 16 x 20, 8 x 10, 4 x 5, 2 x 3, 1 x 2
    assert found["points"] == str(320 + 80 + 20 + 6 + 2)
    assert "head.cls_tower" in table and "backbone.bottom_up" in table


def test_flops_of_the_head_match_its_convolutions(capsys):
    """A 3x3 convolution has 9 C_in C_out multiply-adds per point, and BN two per value."""
    table, found = values(
        capsys, "digits/fcos_R_18_FPN_digits.yaml", "--size", "160", "160", "--depth", "1"
    )
    points = 20 * 20 + 10 * 10
    assert found["points"] == str(points)
    convolutions = 9 * 64 * (2 * 2 * 64 + 10 + 4 + 1) * points
    (head,) = (line for line in table.splitlines() if line.startswith("| head"))
    counted = float(head.split("|")[3].strip().rstrip("M")) * 1e6
    assert convolutions < counted < convolutions * 1.02
    assert "not" not in found


def test_size_of_zero_is_an_error(capsys):
    config = str(ROOT / "configs" / "digits" / "fcos_R_18_FPN_digits.yaml")
    assert analyze.main(["--config-file", config, "--size", "0", "9"]) == 2
    message = "error: the input size must be positive, got 0 x 9; pass --size HEIGHT WIDTH\n"
    assert capsys.readouterr().err == message
