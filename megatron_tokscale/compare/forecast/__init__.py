"""Forecast of the nats that a run has still to learn, and its back-tests."""

from megatron_tokscale.compare.forecast.forecast_text import describe_forecast
from megatron_tokscale.compare.forecast.run_forecast import forecast_run

__all__ = ["describe_forecast", "forecast_run"]
