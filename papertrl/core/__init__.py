"""What everything else builds on: declarations, families, slots, composition, configuration."""
