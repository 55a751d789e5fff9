"""MLflow, the one store of finished results; no other room imports mlflow."""
