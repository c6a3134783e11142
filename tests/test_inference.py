"""Tests the summary table of an evaluation."""

from fcos_d2.inference import summary_table


def test_summary_has_a_row_per_dataset_and_task():
    bbox = {"AP": 41.26, "AP50": 60.0, "AP75": 45.0, "APs": float("nan"), "AP-disc": 41.26}
    results = {
        "one": {"bbox": bbox, "best_f1": {"F1": 71.0, "F1_at_0.5": 65.0}},
        "two": {"bbox": {"AP": 10.0}, "bbox_of_300": {"AP": 30.0}},
    }
    lines = [
        [cell.strip() for cell in line.split("|")] for line in summary_table(results).split("\n")
    ]
    assert lines[0][1:4] == ["dataset", "task", "AP"]
    assert lines[2][1:] == ["one", "bbox", "41.3", "60.0", "45.0", "nan", "", "", "71.0", ""]
    assert [line[1:4] for line in lines[3:]] == [
        ["two", "bbox", "10.0"],
        ["two", "bbox_of_300", "30.0"],
    ]
