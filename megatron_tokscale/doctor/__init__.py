"""The doctor: it looks at a machine, at the hooks in Megatron and at a job's flags."""
