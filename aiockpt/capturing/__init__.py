"""The parts of a capture: copying a state, marking its tensors, naming its keys."""
