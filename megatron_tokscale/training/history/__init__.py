"""Steps, samples and tokens of a run up to the present, including those before this job."""
