"""Tests drawings by their pixels."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fcos_d2.ops import make_levels
from fcos_d2.visualization.assignment import (
    IGNORED_COLOR,
    draw_assignment,
    draw_heat_maps,
    training_panels,
)
from fcos_d2.visualization.boxes import (
    GRAY,
    PALETTE,
    PANEL_SIDE,
    class_color,
    draw_boxes,
    draw_objects,
)
from fcos_d2.visualization.sheet import GUTTER, contact_sheet
from tests.modeling.tiny import sample, tiny_fcos

RED, BLUE = (255, 0, 0), (0, 0, 255)
TITLE = GUTTER + 22  # pixels above the first panel of a sheet with titles


def plain(height=100, width=120, value=128) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def has_color(drawing: np.ndarray, color) -> np.ndarray:
    return (drawing == np.array(color)).all(axis=-1)


# ---- Boxes ----


def test_box_is_drawn_on_its_border():
    image = plain()
    drawing = draw_boxes(image, [[10, 20, 30, 50]], colors=[RED])
    expected = np.zeros((100, 120), bool)
    expected[20:50, 10:30], expected[21:49, 11:29] = True, False
    assert (has_color(drawing, RED) == expected).all()
    assert (drawing[22:48, 12:28] == 128).all()
    assert (drawing[:18] == 128).all() and (drawing[52:] == 128).all()
    assert (image == 128).all(), "draw_boxes changed its input"


def test_scale_enlarges_the_image_and_moves_the_boxes():
    drawing = draw_boxes(plain(80, 60), [[10, 20, 30, 50]], colors=[RED], scale=3)
    assert drawing.shape == (240, 180, 3) and drawing.dtype == np.uint8
    rows, columns = np.nonzero(has_color(drawing, RED))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 149, 30, 89)


def test_boxes_that_are_not_finite_are_skipped_and_others_clipped():
    boxes = [[math.nan, 0, 9, 9], [0, 0, math.inf, 9], [-500, -500, -400, -400], [90, 80, 9e9, 9e9]]
    boxes.append([50, 40, 50, 40])  # without area
    drawing = draw_boxes(plain(), boxes, colors=[RED, RED, BLUE, BLUE, BLUE])
    assert not has_color(drawing, RED).any()
    assert has_color(drawing, BLUE)[80, 90:].all() and has_color(drawing, BLUE)[40, 50]


def test_box_with_the_best_score_is_drawn_on_top():
    boxes = [[10, 30, 60, 80]] * 2
    for scores, top in (([0.2, 0.9], BLUE), ([0.9, 0.2], RED)):
        drawing = draw_boxes(plain(), boxes, scores=scores, colors=[RED, BLUE])
        assert tuple(drawing[79, 35]) == top


def test_labels_of_overlapping_boxes_do_not_overlap():
    boxes, names = [[30, 40, 80, 90]] * 3, ["seven"] * 3
    colors = [RED, BLUE, (0, 255, 0)]
    together = draw_boxes(plain(200, 200), boxes, names, colors=colors)
    alone = draw_boxes(plain(200, 200), boxes[:1], names[:1], colors=[RED])
    outside = np.ones((200, 200), bool)
    outside[40:90, 30:80] = False
    wanted = (has_color(alone, RED) & outside).sum()
    assert wanted > 100
    for color in colors:
        assert (has_color(together, color) & outside).sum() >= 0.9 * wanted


def test_label_of_a_box_in_the_corner_stays_inside_the_image():
    for box in ([0, 0, 12, 12], [108, 88, 120, 100]):
        drawing = draw_boxes(plain(), [box], ["seven"], [0.5], [RED])
        letters = has_color(drawing, (255, 255, 255)) | has_color(drawing, (0, 0, 0))
        assert has_color(drawing, RED).sum() > 300 and letters.sum() > 10


def test_objects_have_class_colors_and_ignored_regions_are_gray():
    drawing = draw_objects(plain(), [[5, 30, 40, 90], [60, 30, 110, 90]], [3, -1], ["a"] * 4)
    assert tuple(drawing[60, 5]) == PALETTE[3]
    assert tuple(drawing[60, 60]) == GRAY


def test_80_classes_have_distinct_colors():
    assert len({class_color(i) for i in range(80)} | {GRAY}) == 81


# ---- Assignment ----


def assignment_panels(labels, levels, centerness=None, size=(64, 64)):
    """Returns the panels of an image of 64 x 64, which is enlarged 5 times."""
    centerness = np.ones(len(labels)) if centerness is None else centerness
    drawing = draw_assignment(plain(*size), labels, levels, 3, centerness, [])
    width = PANEL_SIDE * size[1] // max(size)
    height = PANEL_SIDE * size[0] // max(size)
    lefts = [GUTTER + i * (width + GUTTER) for i in range(len(levels.shapes))]
    assert drawing.shape == (TITLE + height + GUTTER, lefts[-1] + width + GUTTER, 3)
    return [drawing[TITLE : TITLE + height, left : left + width] for left in lefts]


def test_positive_points_have_class_colors_in_the_panel_of_their_level():
    levels = make_levels([(4, 4), (2, 2)], [16, 32])
    labels = np.full(20, 3)
    labels[6], labels[16 + 3] = 1, 2  # row 1 column 2 at (40, 24); row 1 column 1 at (48, 48)
    fine, coarse = assignment_panels(labels, levels)
    assert tuple(fine[24 * 5, 40 * 5]) == PALETTE[1]
    assert tuple(coarse[48 * 5, 48 * 5]) == PALETTE[2]
    for panel, color, (x, y) in ((fine, PALETTE[1], (200, 120)), (coarse, PALETTE[2], (240, 240))):
        rows, columns = np.nonzero(has_color(panel, color))
        assert abs(rows - y).max() < 10 and abs(columns - x).max() < 10
    assert not has_color(fine, PALETTE[2]).any() and not has_color(coarse, PALETTE[1]).any()


def test_background_points_are_darker_than_ignored_ones_and_both_are_gray():
    levels = make_levels([(1, 2)], [32])
    (panel,) = assignment_panels([3, -1], levels, size=(32, 64))
    assert (panel == panel[..., :1]).all()
    background, ignored = panel[70:90, 70:90], panel[60:100, 220:260]
    assert panel[10, 10, 0] < background.max() < ignored.max() <= IGNORED_COLOR[0]
    assert has_color(ignored, IGNORED_COLOR).sum() > 10


def test_disc_grows_with_centerness():
    levels = make_levels([(1, 3)], [16])
    sizes = []
    for centerness in (0.05, 0.5, 1.0):
        (panel,) = assignment_panels([0, 3, 3], levels, [centerness, 0, 0], size=(16, 64))
        sizes.append(has_color(panel, PALETTE[0]).sum())
    assert 5 < sizes[0] < sizes[1] < sizes[2]


def test_points_in_the_padding_are_not_drawn():
    levels = make_levels([(4, 4)], [16])  # the batch is 64 x 64, this image 40 x 64
    labels = np.full(16, 3)
    labels[[5, 13]] = 0  # at (24, 24) and (24, 56)
    (panel,) = assignment_panels(labels, levels, size=(40, 64))
    assert tuple(panel[24 * 5, 24 * 5]) == PALETTE[0]
    rows, _ = np.nonzero(has_color(panel, PALETTE[0]))
    assert rows.max() < 30 * 5


def test_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match=r"labels must have shape \[4\].* got \[5\]"):
        draw_assignment(plain(), np.zeros(5, int), make_levels([(2, 2)], [8]), 1, np.ones(5), [])


# ---- Panels of a model ----


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tiny_fcos("INPUT.FORMAT", "BGR", NORM="BN")
    nn.init.constant_(model.head.cls_logits.bias, 2.0)  # high scores everywhere
    return model.train()


@pytest.fixture
def batch():
    return [sample(64, 96, [[8, 8, 40, 40], [50, 10, 90, 60]], [0, 2]), sample(96, 96)]


def test_training_panels_do_not_change_the_model(model, batch):
    model.backbone.eval()  # as a frozen backbone
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    panels = training_panels(model, batch)
    assert list(panels) == ["ground_truth", "assignment", "heat", "detections"]
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in panels.values())
    assert [module.training for module in model.modules()] == modes and any(modes)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()


def test_training_panels_convert_the_first_image_to_rgb(model, batch):
    image = torch.zeros(3, 64, 96)
    image[0] = 250  # blue, in the model's BGR
    panel = training_panels(model, [{**batch[0], "image": image}])["ground_truth"]
    assert has_color(panel, (0, 0, 250)).sum() > 10000
    assert has_color(panel, PALETTE[0]).any() and has_color(panel, PALETTE[2]).any()


def test_training_panels_show_assignment_and_predictions_of_all_levels(model, batch):
    panels = training_panels(model, batch)
    panel, heat = panels["assignment"], panels["heat"]
    assert panel.shape[1] == heat.shape[1] == 3 * PANEL_SIDE + 4 * GUTTER
    assert has_color(panel, PALETTE[0]).any() and has_color(panel, PALETTE[2]).any()
    assert heat.shape[0] > 2 * round(PANEL_SIDE * 64 / 96)
    assert training_panels(model, [sample(64, 64)])["assignment"].shape[2] == 3  # without objects


def test_training_panels_limit_the_number_of_detections(model, batch):
    colors = [PALETTE[i] for i in range(3)]
    drawn = []
    for limit in (0, 1, 20):
        panel = training_panels(model, batch, max_detections=limit)["detections"]
        drawn.append(sum(has_color(panel, color).sum() for color in colors))
    assert drawn[0] == 0 < drawn[1] < drawn[2]


# ---- Heat maps ----


def test_values_are_drawn_from_black_to_white_in_the_cells_of_their_points():
    levels = make_levels([(2, 3), (1, 2)], [8, 16])
    values = np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]])
    sheet = draw_heat_maps(plain(16, 24, 0), {"ctrness": [values, np.zeros((1, 2))]}, levels)
    scale = PANEL_SIDE / 24
    panel = sheet[TITLE : TITLE + round(16 * scale), GUTTER : GUTTER + PANEL_SIDE].astype(int)
    cells = [
        [panel[int((i + 0.5) * 8 * scale), int((j + 0.5) * 8 * scale)] for j in range(3)]
        for i in range(2)
    ]
    assert cells[0][1].min() > 0.7 * 160 and cells[0][0].max() < 10
    assert cells[0][0].sum() < cells[1][0].sum() < cells[0][1].sum()


def test_heat_in_the_padding_is_cropped():
    levels = make_levels([(4, 4)], [8])
    values = np.zeros((4, 4))
    values[:, 2:] = 1
    sheet = draw_heat_maps(plain(32, 16, 0), {"q": [values]}, levels)
    assert sheet.shape[1] == 2 * GUTTER + 160
    assert sheet[TITLE : TITLE + PANEL_SIDE, GUTTER : GUTTER + 160].max() < 10


def test_heat_maps_of_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"maps must have the shapes \[\(2, 3\)\]"):
        draw_heat_maps(plain(), {"q": [np.zeros((3, 2))]}, make_levels([(2, 3)], [8]))


# ---- Sheets ----


def test_images_of_a_sheet_are_in_rows_and_columns():
    a, b, c = plain(20, 30, 10), plain(25, 40, 20), plain(10, 12, 30)
    sheet = contact_sheet([[a, b], [c, None]])
    assert sheet.shape == (
        GUTTER + 25 + GUTTER + 10 + GUTTER,
        GUTTER + 30 + GUTTER + 40 + GUTTER,
        3,
    )
    expected = np.full_like(sheet, 255)
    expected[6:26, 6:36], expected[6:31, 42:82], expected[37:47, 6:18] = 10, 20, 30
    assert (sheet == expected).all()
    assert contact_sheet([]).ndim == 3


def test_gutters_between_groups_are_three_times_as_wide():
    sheet = contact_sheet([[plain(9, 10, 0)] * 4], group=2)
    dark = np.flatnonzero((sheet[10] == 0).all(axis=-1))
    assert dark[::10].tolist() == [6, 22, 50, 66]
    assert sheet.shape[1] == 66 + 10 + GUTTER


def test_text_of_a_sheet_does_not_cover_images():
    black = plain(40, 80, 0)
    sheet = contact_sheet([[black, black]], ["W" * 50, ""], "heading", [["caption", ""]])
    top = TITLE + 30
    assert sheet.shape == (top + 40 + 20 + GUTTER, 3 * GUTTER + 160, 3)
    assert (sheet[top : top + 40, 6:86] == 0).all() and (sheet[top : top + 40, 92:172] == 0).all()
    heading, title, caption = sheet[6:32], sheet[36:top], sheet[top + 40 :]
    for band in (heading, title[:, :86], caption[:, :86]):
        assert (band < 200).any()
    assert (title[:, 90:] == 255).all() and (caption[:, 90:] == 255).all()
