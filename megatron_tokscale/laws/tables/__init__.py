"""Laws of loss curves in tables, as W&B and TensorBoard export them: CSV or parquet."""
