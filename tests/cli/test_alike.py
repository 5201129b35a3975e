"""Options that are alike on every command."""

import pytest
import typer

from endwise.cli import app

WITHOUT = {
    "--json": {"serve": "runs until it is stopped", "version": "is a word"},
    "--out": {
        "convert pull": "takes OUT as an argument",
        "evaluate explain harvest serve": "writes into the runs",
        "push track": "writes elsewhere than on this machine",
        "doctor inspect runs sites steer version": "writes nothing",
    },
    "--quiet": {
        "adopt compare-explanations convert directions doctor evaluate export-neuronpedia init inspect pareto plan "
        "runs sites steer track version": "shows no progress",
    },
    "--again": {
        "bench finetune quickstart reproduce sweep train": "resumes",
        "explain pull push track": "asks or sends only what is missing",
        "adopt convert": "replaces nobody's SAE",
        "compare-explanations dashboard directions doctor evaluate export-neuronpedia geometry inspect pareto plan "
        "runs sites steer version": "makes it again each time",
    },
}
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("option", WITHOUT)
def test_every_command_that_can_have_an_option_has_it(option):
    helps = {
        name: parameter.help
        for name, command in COMMANDS.items()
        for parameter in command.params
        if option in parameter.opts
    }
    assert COMMANDS.keys() - helps.keys() == set(" ".join(WITHOUT[option]).split())
    if option != "--out":  # which says what is written
        assert len(set(helps.values())) == 1


def test_the_version_and_completion_are_options_of_the_program():
    told = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert {"--version", "--install-completion", "--show-completion"} <= told
