"""Tests the fcos-d2 program and the help of its commands."""

import pytest

from fcos_d2 import model_zoo
from fcos_d2.commands import cli, train


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_is_listed_and_has_help(name, capsys):
    assert f"fcos-d2 {name} " in cli.__doc__
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fcos-d2 {name} ".replace(" predict", ""))


def test_without_arguments_the_commands_are_listed_and_it_fails(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("fcos-d2 photo.jpg") == 2


@pytest.mark.parametrize(
    "kind, name", [("setup_cfg", "fcos_R_50_FPN_1x"), ("run_lazy", "lazy/fcos_R_50_FPN_1x")]
)
def test_train_accepts_names_in_the_model_zoo(kind, name, monkeypatch):
    files = []
    monkeypatch.setattr(train, kind, lambda args: files.append(args.config_file) or exit(7))
    with pytest.raises(SystemExit):
        cli.main(["train", "--config-file", name])
    assert files == [model_zoo.get_config_file(name)]
