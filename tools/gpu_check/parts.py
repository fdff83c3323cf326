"""The parts of the check, the ones that matter most first."""

from typing import Final

from gpu_check import layout_parts, number_parts, training_parts
from gpu_check.checks import Part

PARTS: Final = (
    Part("gathering", 15, number_parts.gathering),
    Part("isolation", 60, training_parts.isolation),
    Part("restore", 50, training_parts.restore),
    Part("losses", 30, number_parts.losses),
    Part("cost", 45, number_parts.cost),
    Part("fit", 60, number_parts.fit),
    Part("steps", 60, number_parts.steps),
    Part("moe", 40, training_parts.moe),
    Part("endings", 100, training_parts.endings),
    Part("te", 80, training_parts.transformer_engine),
    Part("fp8", 80, training_parts.fp8),
    Part("layouts", 200, layout_parts.layouts),
)
