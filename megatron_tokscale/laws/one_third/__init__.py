"""The one-third law of Liu et al., and the test by groups that tells it from quanta."""
