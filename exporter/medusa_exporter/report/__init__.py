"""Renders one HTML page of the measurements of `medusa-export bench`, from one or several runs."""
