"""Encoding of whole data sets with a registered model, on Ray Data."""
