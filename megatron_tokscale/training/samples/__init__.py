"""Losses of the training samples: recorded in a job that trains, or computed in a replay."""
