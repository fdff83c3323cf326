"""The data exponent predicted from the statistics of the language (Cagnetta et al.)."""
