"""Measures of trained models, the statistics that compare them, and figures."""
