"""Retraining on new data: when a model is trained again, and when the new one becomes the champion."""
