"""From a job's samples to documents, and back."""
