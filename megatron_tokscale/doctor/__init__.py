"""The doctor: checks of a machine, of the hooks in Megatron and of a job's flags."""
