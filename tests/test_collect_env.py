"""Tests the environment report."""

import runpy
import warnings

import fcos_d2
from fcos_d2 import collect_env, ops


def test_report_has_versions_and_the_backend_of_every_op():
    report = collect_env.collect_env_info()
    assert f"fcos_d2  {fcos_d2.__version__}" in report
    assert "PyTorch" in report and "detectron2" in report
    for name in ops.backend():
        assert name in report


def test_failing_section_does_not_affect_the_others(monkeypatch):
    def broken():
        raise OSError("no compiler")

    monkeypatch.setattr("detectron2.utils.collect_env.collect_env_info", broken)
    report = collect_env.collect_env_info()
    assert "OSError: no compiler" in report and "assign_targets" in report


def test_module_prints_the_report(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported already
        runpy.run_module("fcos_d2.collect_env", run_name="__main__")
    assert "sigmoid_focal_loss" in capsys.readouterr().out
