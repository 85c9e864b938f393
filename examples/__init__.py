"""The paper's experiments, and first examples, on the public API."""
