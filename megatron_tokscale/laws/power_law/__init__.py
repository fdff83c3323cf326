"""Power laws: of the mean loss, and of the tail of the spectrum."""
