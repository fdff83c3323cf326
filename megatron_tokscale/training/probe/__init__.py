"""The probe in the job: its schedule, its pass, its isolation and its metrics."""
