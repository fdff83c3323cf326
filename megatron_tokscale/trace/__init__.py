"""From samples and steps to documents, and back."""
