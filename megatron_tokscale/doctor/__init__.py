"""What is installed, which hooks Megatron has, and for what a job's flags would be refused."""
