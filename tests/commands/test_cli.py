"""fcos-d2: one program, and every command of it says how it is used."""

import pytest

from fcos_d2.commands import cli


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
