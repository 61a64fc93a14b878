"""Token trees: topology, masks, the catalogue and search. Needs numpy and a TOML reader and writer only."""
