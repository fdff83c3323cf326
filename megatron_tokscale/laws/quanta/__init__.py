"""The quantization model of Michaud et al."""
