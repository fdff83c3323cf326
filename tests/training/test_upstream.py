"""`--help` of a training script prints, with the plugin's flags among Megatron's."""

import re
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import fields

import pytest
from jobs import job_environment
from megatrons import INSTALLED, OLD, python_path

from megatron_tokscale.training.config import TokscaleConfig, flag_of
from megatron_tokscale.training.upstream import escape_percent_signs

SCRIPT = """
import sys
from megatron.training.arguments import parse_args
parse_args()
"""


@pytest.mark.megatron
@pytest.mark.parametrize("version", [*OLD, INSTALLED])
def test_help_prints_every_flag(tmp_path, version):
    (tmp_path / "pretrain_mine.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "megatron_tokscale.run", str(tmp_path / "pretrain_mine.py")]
    environment = job_environment() | {"PYTHONPATH": python_path(version)}
    result = subprocess.run(
        [*command, "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for each in fields(TokscaleConfig):
        assert len(re.findall(rf"^  {flag_of(each.name)}(?![\w-])", result.stdout, re.M)) == 1
    assert "--num-layers" in result.stdout
    assert "Turns the probe on." in " ".join(result.stdout.split())


def test_a_percent_sign_is_escaped_where_argparse_cannot_format_it():
    parser = ArgumentParser(prog="train")
    parser.add_argument("--headroom", default=1.1, help="1.10 = 10%).")
    parser.add_argument("--rate", default=3, help="of %(prog)s, 5%% by default %(default)s")
    parser.add_argument("--plain", help="no sign")
    parser.add_argument("--unknown", help="%(nothing)s")
    escape_percent_signs(parser)
    text = parser.format_help()
    assert "1.10 = 10%)." in text
    assert "of train, 5% by default 3" in text
    assert "%(nothing)s" in text
