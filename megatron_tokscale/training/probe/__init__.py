"""The probe in the job: when, the pass itself, isolation, metrics."""
