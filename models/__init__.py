"""Tiny models, start models, encoders, small estimators, and how to look into a model."""
