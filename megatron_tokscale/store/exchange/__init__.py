"""Losses of other people's files as runs, and runs as files that other people read."""
