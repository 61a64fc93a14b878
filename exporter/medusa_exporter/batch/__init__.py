"""Batch files in OpenAI's format: a file of requests is answered into a file of responses, and can be resumed."""
