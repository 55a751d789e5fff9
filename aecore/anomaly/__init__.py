"""Anomalies: how strange rows are to an autoencoder or to a reference, and how well that ranks anomalies first."""
