"""From data sets to rows in three splits: named sets, Parquet in memory, and Parquet read from disk."""
