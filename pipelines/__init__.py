"""From an experiment to finished runs: the graph of stages, Ray to compute them, MLflow to keep them."""
