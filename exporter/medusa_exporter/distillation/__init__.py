"""Self-distillation: the model writes the text that its heads are trained on."""
