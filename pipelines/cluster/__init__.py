"""Ray without MLflow: connecting, which nodes there are, what share a stage gets, and reading data in parallel."""
