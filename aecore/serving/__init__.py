"""A finished model as it is used: served by MLflow, or applied to a whole data set."""
