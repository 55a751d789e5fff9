"""A whole data set through a registered model, on Ray Data."""
