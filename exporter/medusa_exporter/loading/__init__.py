"""What is checked while a model is loaded: its config, its weights, its end tokens and its chat templates."""
