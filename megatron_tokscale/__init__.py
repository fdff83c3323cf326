"""Learning-time spectra for Megatron-LM: which tokens is the model learning now?

Importing this package is cheap: neither torch nor Megatron is loaded until a room that needs
them is imported (`megatron_tokscale.fit`, `megatron_tokscale.training`, ...).
"""

__version__ = "0.1.0"
