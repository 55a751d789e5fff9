"""Champion and challenger: when a model is trained again, and when the new one takes over."""
