"""The rows of a data set, from Parquet to batches."""
