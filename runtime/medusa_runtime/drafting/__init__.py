"""What a step verifies: the heads' tree, a continuation copied from the text before, or both."""
