"""What the steps of a run consumed, also of steps before this job."""
