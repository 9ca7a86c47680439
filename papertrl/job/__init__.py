"""A training job: from a command line to a trained model with its report."""
