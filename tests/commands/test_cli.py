"""fcos-d2: one program, and every command of it says how it is used."""

import pytest

from fcos_d2 import model_zoo
from fcos_d2.commands import cli, train


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_is_listed_and_has_a_help_of_its_own(name, capsys):
    assert f"fcos-d2 {name} " in cli.__doc__
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fcos-d2 {name} ".replace(" predict", ""))


def test_nothing_typed_lists_the_commands_and_fails(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("fcos-d2 photo.jpg") == 2


@pytest.mark.parametrize(
    "kind, name", [("setup_cfg", "fcos_R_50_FPN_1x"), ("run_lazy", "lazy/fcos_R_50_FPN_1x")]
)
def test_training_takes_names_of_the_model_zoo(kind, name, monkeypatch):
    taken = []
    monkeypatch.setattr(train, kind, lambda args: taken.append(args.config_file) or exit(7))
    with pytest.raises(SystemExit):
        cli.main(["train", "--config-file", name])
    assert taken == [model_zoo.get_config_file(name)]
