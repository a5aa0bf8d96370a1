"""What was found: events during a run, results after it. Frozen plain data, no torch, readable back from JSON.

Units are in the names: `_s` seconds, `_ms` milliseconds, `_mib` mebibytes (2**20 bytes). `None` means unknown or never,
and is never replaced by a zero.
"""
