"""The rows of a dataset, from Parquet files to micro-batches."""
