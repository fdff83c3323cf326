"""The one-third law of Liu et al., and the test by groups that separates it from quanta."""
