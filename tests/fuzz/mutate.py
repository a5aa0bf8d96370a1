"""Mutations of good files: bits, bytes, words and lines, with hostile words among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

# Where a format's parts begin and end.
WORD = re.compile(rb"[A-Za-z_][\w.-]*|[-+]?\d[\d.eE+-]*|\"[^\"\n]*\"|[^\sA-Za-z0-9_\"]")
NUMBERS = (
    b"0", b"-1", b"1", b"2", b"1e308", b"-1e308", b"1e309", b"1e-320", b"1e999", b"0.0", b"-0.0", b"0.1", b"NaN",
    b".nan", b".inf", b"-.inf", b"Infinity", b"-Infinity", b'"NaN"', b'"Infinity"', b"2147483647", b"2147483648",
    b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"1" * 401, b"9" * 4301, b"0x" + b"f" * 99,
    b"1_000", b"012", b"0o17", b"1.", b".5", b"+1", b"1e", b"1 000", b"\xd9\xa3", "２".encode(), b"20x20",
)  # fmt: skip
CANARY = "the-canary"  # a name that nothing but the code of an input gives a folder or a module
WORDS = (
    b"", b"null", b"~", b"true", b"false", b"no", b"[]", b"{}", b'""', b"[[]]", b"{a: b}", b"'", b'"', b"\\", b"\x00",
    b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b]0;title\a\x1b[31m", "\u2028".encode(), "\U0010ffff".encode(),
    b"\\U00110000", b"\\ud800", b"\r",
    b'"\\U00110000"', b'"\\ud800"', b'"\\e]0;title\\a"', b'"\\u009b31m"', b'"\\x7f\\n"', "\x9b2J".encode(),
    b"\r\n", b"\t", b"\n\n", b"---\n", b"...", b"#", b": ", b"- ", b", ", b"? ",
    b"x" * 5000, b"[" * 50, b"[" * 3000, b"{a: " * 60, b"(" * 200, b"&a ", b"*a", b"&a [*a]", b"<<: ", b"|\n", b">\n",
    b"!!python/object/apply:os.mkdir [the-canary]", b"!!python/name:os.system", b"!!python/module:os", b"!x ",
    b"!!set ", b"!!binary aGk=", b"!!timestamp 2001-01-01", b"!<tag:yaml.org,2002:python/object/apply:os.mkdir> ",
    b"the-canary:make", b"os:system", b"os:mkdir", b"builtins:exec", b"a.b:c", b":", b"..", b"../..", b"/dev/zero",
    b"/dev/stdin", b"/etc/passwd", b"/proc/self/mem", b"~root", b"~nobody/x", b"-", b"--", b"a/b\\c", b"%s%n", b"{0}",
    b"${HOME}", b"__class__", b"__proto__", b"model_config", b"self", b"kind", b"format_version",
)  # fmt: skip


def mutated(random: Random, good: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One of the good files after one to four changes."""
    data = random.choice(good)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        data = random.choice(CHANGES)(random, data, good, (*WORDS, *words))
    return data


Change = Callable[[Random, bytes, Sequence[bytes], Sequence[bytes]], bytes]


def _flip(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _random_bytes(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    at, over = random.randrange(len(data) + 1), random.choice((0, 1, 4))
    return data[:at] + random.randbytes(random.choice((1, 1, 2, 4, 8))) + data[at + over :]


def _slice(random: Random, size: int) -> slice:
    start = random.randrange(size + 1)
    return slice(start, min(size, start + random.choice((1, 2, 4, 16, 64, 256, size))))


def _delete(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    cut = _slice(random, len(data))
    return data[: cut.start] + data[cut.stop :]


def _repeat(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    part = _slice(random, len(data))
    times = random.choice((2, 2, 3, 20)) if part.stop - part.start < 100 else 2
    return data[: part.start] + data[part] * times + data[part.stop :]


def _splice(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    other = random.choice(good)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _lines(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    lines = data.splitlines(keepends=True) or [b"\n"]
    others = random.choice(good).splitlines(keepends=True) or [b"\n"]
    at, kind = random.randrange(len(lines)), random.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, random.choice(others))
    elif kind == 2:
        lines[at] = b" " * random.randrange(1, 4) + lines[at]
    else:
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return b"".join(lines)


def _word(random: Random, data: bytes, good: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Another word in the place of one: a hostile one, a number, or one from a good file."""
    start = random.randrange(len(data) + 1)
    found = WORD.search(data, start) or WORD.search(data)
    if found is None:
        return data + random.choice(words)
    other = WORD.findall(data if random.random() < 0.5 else random.choice(good)) or [b""]
    chosen = random.choice((other, other, NUMBERS, words))
    return data[: found.start()] + random.choice(chosen) + data[found.end() :]


CHANGES: tuple[Change, ...] = (_flip, _random_bytes, _delete, _repeat, _splice, _lines, *[_word] * 6)
