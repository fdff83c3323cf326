"""Counts and times in the texts that verbs print."""

import pytest

from megatron_tokscale.core.words import counted, time_text


def test_one_thing_has_no_plural():
    assert (counted(1, "token"), counted(3010, "token")) == ("1 token", "3,010 tokens")
    assert (counted(1, "loss", "losses"), counted(0, "loss", "losses")) == ("1 loss", "0 losses")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1280, "1,280"), (0.25, "0.25"), (12.8, "12.8"), (3.5e9, "3.5e+09"), (1e301, "1e+301")],
)
def test_a_time_on_any_axis_fits_a_column_of_16_characters(value, text):
    assert time_text(value) == text
    assert len(f"from {time_text(value)}") < 16
