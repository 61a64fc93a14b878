"""TensorRT engines: which ones a bundle needs, how each flavour builds one, what is kept beside it."""

FOLDER = "engines"  # of a bundle
