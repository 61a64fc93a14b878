"""One backend's outputs beside another's, tensor by tensor, on the same steps."""
