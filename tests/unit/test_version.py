"""What runs, for the record."""

import pytest

from smtune.version import command_line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/somewhere/bin/smtune", "bench", "--quick"], "smtune bench --quick"),
        (["/somewhere/smtune/__main__.py", "train", "a recipe.yaml"], "smtune train 'a recipe.yaml'"),
        (["examples/plain_loop.py"], "plain_loop.py"),
    ],
)
def test_a_command_can_be_given_again_and_names_no_folder_of_the_machine(arguments, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", arguments)
    assert command_line() == expected
