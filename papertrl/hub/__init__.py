"""From the folder of a run to the Hub: run files, cards, publishing, Spaces."""
