"""Where files are kept: the storage port and its local implementation."""
