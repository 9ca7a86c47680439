"""The declarations of all methods: one TOML file each."""
