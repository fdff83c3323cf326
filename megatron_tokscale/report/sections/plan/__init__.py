"""The section on the data plan."""
