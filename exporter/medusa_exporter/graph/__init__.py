"""One trace, a dialect per backend: how a decoder and its heads become one ONNX graph."""
