"""What the tests share: the table over the catalogue, blocks of methods, and small models, data and runs."""
