"""The door for DeepSpeed, and for code written against its checkpoint interface.

`install()` makes `deepspeed.initialize` use aiockpt where the configuration has an
`"aiockpt"` or a `"datastates_ckpt"` block. `CheckpointEngine` is the interface itself;
neither needs DeepSpeed to be imported.
"""

from aiockpt.integrations.deepspeed.facade import CheckpointEngine
from aiockpt.integrations.deepspeed.installing import install

__all__ = ["CheckpointEngine", "install"]
