"""The data exponent from the statistics of the language (Cagnetta et al.)."""
