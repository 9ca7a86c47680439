"""Jinja templates of the cards that papertrl writes; rendered by `papertrl.hub.cards`."""
