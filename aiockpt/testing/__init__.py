"""What tests of programs that use aiockpt need: faults to inject, invariants to check.

`faults` makes the system's calls fail, fall short or be the last, by `system_calls`,
which sees every one of them; `roots` checks that what is left on the disk is what
aiockpt promises. `strategies` (needs hypothesis) makes state dicts, `simulated_device`
pretends CUDA devices, and `storage_contract` (needs pytest) tests an implementation of
the storage port. Nothing in aiockpt imports this package.
"""

__all__: list[str] = []
