"""The multi-power law of learning-rate schedules."""
