"""TensorRT engines: which ones a bundle needs, how each flavour builds one, what is kept beside it."""
