"""The version of the JSON that `medusa-export bench --json` writes, and that its readers check."""

SCHEMA = 2  # 1 had other names for some results
