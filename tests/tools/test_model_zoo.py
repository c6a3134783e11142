"""Tests that MODEL_ZOO.md is up to date, and that models have their published sizes."""

import re

import pytest

from . import ROOT, load_script

# Config -> number of parameters, counted with the authors' code, minus known differences.
PUBLISHED = {
    "fcos_R_50_FPN_1x": 32_244_250,
    "fcos_R_50_FPN_2x": 32_244_250,
    "fcos_R_50_FPN_1x_iou": 32_244_250,
    "fcos_R_101_FPN_2x": 51_184_154,
    "fcos_X_101_32x8d_FPN_2x": 95_328_794,
    "fcos_X_101_64x4d_FPN_2x": 89_992_730,
    "vovnet/fcos_V_39_FPN_3x": 33_625_370,
    "vovnet/fcos_V_57_FPN_3x": 49_884_954,
    "vovnet/fcos_V_99_FPN_3x": 77_931_034,
    "rt/fcos_RT_R_50_FPN_4x": 31_114_264,
    "rt/fcos_RT_R_50_FPN_4x_bn": 31_122_456,
    "original/fcos_R_50_FPN_1x": 32_244_250,
    "original/fcos_R_101_FPN_2x": 51_184_154,
    "original/fcos_X_101_32x8d_FPN_2x": 95_328_794,
    "original/fcos_X_101_64x4d_FPN_2x": 89_992_730,
    "original/fcos_imprv_R_50_FPN_1x": 32_244_250,
    "original/fcos_imprv_R_101_FPN_2x": 51_184_154,
    "original/fcos_imprv_X_101_32x8d_FPN_2x": 95_328_794,
    "original/fcos_imprv_X_101_64x4d_FPN_2x": 89_992_730,
    "original/fcos_imprv_dcnv2_R_50_FPN_1x": 33_239_983,
    "original/fcos_imprv_dcnv2_R_101_FPN_2x": 53_237_882,
    "original/fcos_imprv_dcnv2_X_101_32x8d_FPN_2x": 102_670_094,
    "original/fcos_imprv_dcnv2_X_101_64x4d_FPN_2x": 97_334_030,
    "original/fcos_syncbn_bs32_c128_MNV2_FPN_1x": 3_888_090,
    "original/fcos_syncbn_bs32_MNV2_FPN_1x": 9_798_234,
    "original/fcos_bn_bs16_MNV2_FPN_1x": 9_798_234,
    "detectron2/fcos_R_50_FPN_1x": 32_244_245,  # no Scale
}
UNUSED_PROJECTIONS = (64 + 2) * 128 + (128 + 2) * 256  # of level3 and level4, including norms
PUBLISHED |= {
    f"rt/fcos_RT_DLA_34_FPN_4x{suffix}": count - UNUSED_PROJECTIONS
    for suffix, count in {
        "": 22_191_880,
        "_shtw": 19_829_512,
        "_bn": 22_200_072,
        "_shtw_bn": 19_833_608,
    }.items()
}
UNUSED_CLASSES = (91 - 80) * (256 * 9 + 1)
PUBLISHED["torchvision/fcos_R_50_FPN"] = 32_269_600 - UNUSED_CLASSES
R_50_NORMS = 53_120  # constant weights and biases that mmdetection counts
TOWER_BIASES = 8 * 256  # missing in mmdetection's older head
PUBLISHED["mmdetection/fcos_R_50_FPN_1x"] = 32_295_322 - R_50_NORMS + TOWER_BIASES
PUBLISHED["mmdetection/fcos_tricks_R_50_FPN_1x"] = 32_297_370 - R_50_NORMS


model_zoo = load_script("tools/model_zoo.py")


@pytest.fixture(scope="module")
def text() -> str:
    return model_zoo.write_zoo()


@pytest.fixture(scope="module")
def rows(text) -> dict[str, list[str]]:
    """Returns config -> cells of its row."""
    found = re.findall(r"^\| \[\w+\]\(configs/(.+)\.yaml\) \| (.+) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_file_is_up_to_date(text):
    assert (ROOT / "MODEL_ZOO.md").read_text() == text, "type: python tools/model_zoo.py"


def test_every_experiment_is_listed_once(text, rows):
    listed = re.findall(r"\(configs/(.+)\.yaml\)", text)
    configs = {
        str(path.relative_to(ROOT / "configs").with_suffix(""))
        for path in (ROOT / "configs").rglob("fcos_*.yaml")
        if path.parent.name not in ("quick_schedules", "custom")
    }
    assert sorted(listed) == sorted(configs) and set(rows) == configs


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_the_published_number_of_parameters(name, rows):
    assert int(rows[name][0].replace(",", "")) == PUBLISHED[name]


def test_rows_have_recipe_and_accuracies(rows):
    assert rows["fcos_R_50_FPN_2x"][1:] == ["16 x 180,000", "640 to 800", "41.0 (41.4)", "", "", ""]
    row = rows["original/fcos_syncbn_bs32_MNV2_FPN_1x"]
    assert row[1:] == ["32 x 90,000", "800", "33.1", "", "", ""]
    assert rows["digits/fcos_R_18_FPN_digits"][3] == ""
    *_, weights, license = rows["torchvision/fcos_R_50_FPN"]
    assert weights.endswith("fcos_resnet50_fpn_coco-99b0c9b7.pth)") and license == "BSD-3-Clause"


def test_measured_accuracy_is_shown(monkeypatch):
    monkeypatch.setattr(model_zoo, "MEASURED", {"fcos_R_50_FPN_1x": "38.8"})
    section = model_zoo.SECTIONS[0]._replace(models={"fcos_R_50_FPN_1x": "38.7"})
    assert model_zoo._section(section).rstrip().endswith("| 38.7 | 38.8 |  |  |")


def test_script_writes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_zoo, "SECTIONS", model_zoo.SECTIONS[-1:])
    assert model_zoo.main(["--output", str(tmp_path / "zoo.md")]) == 0
    assert (tmp_path / "zoo.md").read_text() == model_zoo.write_zoo()
    assert capsys.readouterr().out.strip() == str(tmp_path / "zoo.md")
