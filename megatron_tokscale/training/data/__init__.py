"""The job's training data: the dataset that follows a plan, and decisions while it trains."""
