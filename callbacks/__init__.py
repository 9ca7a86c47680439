"""Observers: callbacks that watch a run."""
