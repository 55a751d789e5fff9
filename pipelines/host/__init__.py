"""The machine and process that a command runs on: temporary files, environment variables, messages."""
