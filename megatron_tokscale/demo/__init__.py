"""The whole loop on one machine without a GPU: train, probe, fit, spectrum, plan, train again."""

from megatron_tokscale.demo.steps import run_demo

__all__ = ["run_demo"]
