"""Megatron's .bin/.idx files and the flags that name them, read in one place."""
