"""Results: events during a run and results after it, as frozen plain data that JSON reads back. No torch.

Units are in the names: `_s` seconds, `_ms` milliseconds, `_mib` mebibytes (2**20 bytes). `None` means unknown or never,
and is never replaced by a zero.
"""
