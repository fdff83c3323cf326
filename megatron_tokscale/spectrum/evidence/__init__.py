"""The tests of a spectrum that can fail."""
