"""Steps, samples and tokens of a run up to the present, also of steps before this job."""
