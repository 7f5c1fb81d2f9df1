"""File formats: what stands at which offset, and how to read it back."""
