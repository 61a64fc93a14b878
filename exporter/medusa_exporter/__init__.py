"""Makes, verifies and measures Medusa bundles."""
