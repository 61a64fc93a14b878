"""One page of what `medusa-export bench` measured, in one Python or in several."""
