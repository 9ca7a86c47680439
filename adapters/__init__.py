"""What is done with trained adapters."""

from .combine import Combination, combine_domains, fit_weights, weighted

__all__ = ["Combination", "combine_domains", "fit_weights", "weighted"]
