"""The axes D and M as shifts of the clock: arrays in, results of `results/axis.py` out."""
