"""The commands: each parses its settings, calls the pipeline that does the work, and prints the result."""
