"""Tests of the help of the command `parakeet`."""

import re

from typer.testing import CliRunner

from transformers_parakeet_cli.app import app


def test_the_help_lists_every_subcommand():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Transcribe audio and video files." in result.stdout
    for command in ("transcribe", "demo", "info", "convert", "finetune", "evaluate", "verify"):
        assert re.search(rf"\b{command}  ", result.stdout)
