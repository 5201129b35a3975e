"""Options that are alike on every command."""

import pytest
import typer
from typer.testing import CliRunner

from endwise.cli import app
from endwise.cli.app import IN_SEVERAL_PROCESSES

WITHOUT = {
    "--json": {"serve": "runs until it is stopped", "version": "is a word"},
    "--out": {
        "convert pull": "takes OUT as an argument",
        "evaluate explain harvest serve": "writes into the runs",
        "push track": "writes elsewhere than on this machine",
        "doctor inspect runs sites steer version": "writes nothing",
    },
    "--quiet": {
        "adopt compare-explanations convert doctor export-neuronpedia init inspect pareto plan "
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


@pytest.mark.parametrize("words", ["sites", "importance a-run", "export-neuronpedia a-run", "sweep a.yaml"])
def test_a_command_that_is_one_process_says_so_under_torchrun(words):
    several = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}
    done = CliRunner().invoke(app, words.split(), env=several)
    assert done.exit_code == 2 and done.stdout == ""
    assert f"torchrun started endwise {words.split()[0]} 2 times" in done.stderr
    assert CliRunner().invoke(app, ["version"], env=several).exit_code == 0
    assert COMMANDS.keys() >= IN_SEVERAL_PROCESSES
