"""The parts of the loader: what to read where, reading it, and making objects."""
