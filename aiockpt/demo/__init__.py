"""The demonstration: a real model, trained, killed in the middle of a save, resumed.

`aiockpt demo` shows it. `trainer` is also meant to be read: it is how an asyncio
training loop uses the engine.
"""

__all__: list[str] = []
