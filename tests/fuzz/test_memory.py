"""The largest files that are read at all, with what takes most memory inside: none takes more than two gigabytes."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from portllm.checkpoint.safetensors.header import MAX_HEADER_BYTES
from portllm.files.json_text import MAX_VALUES

MOST_BYTES = 2_000_000_000

JSON = "from portllm.tensors.bytes import read_json as read"
HEADER = "from portllm.tensors.bytes import read_header as read"
GGUF = "from portllm.checkpoint.gguf.header import read_gguf_header as read"
LIST = """
from portllm.checkpoint.gguf.file import open_gguf
read = lambda file: open_gguf(file).texts("k")
"""
ROWS = """
from portllm.running.examples import read_texts
read = lambda file: read_texts(file, "{a}")
"""
PROGRAM = """
import sys
from pathlib import Path
from portllm.errors import PortLLMError
{how}
try:
    read(Path(sys.argv[1]))
except PortLLMError as error:
    print(error, file=sys.stderr)
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def values(unit, *, count):
    """JSON of an object with a list of the same value again and again."""
    return b'{"a":[' + b",".join([unit] * count) + b"]}"


def entries(value, *, count):
    return b"{" + b",".join(b'"k%d":%s' % (number, value) for number in range(count)) + b"}"


def header(_=None):
    text, number = bytearray(b"{"), 0
    while len(text) < MAX_HEADER_BYTES - 100:
        span = b"%d,%d" % (4 * number, 4 * number + 4)
        text += b'"%x":{"dtype":"F32","shape":[],"data_offsets":[%s]},' % (number, span)
        number += 1
    text[-1:] = b"}"
    return struct.pack("<Q", len(text)) + text + bytes(4 * number)


def gguf(tensors=0, fields=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body


def text(content):
    return struct.pack("<Q", len(content)) + content


def gguf_tensors(count=1 << 18):
    described = (text(b"%x" % number) + struct.pack("<IQIQ", 1, 8, 0, 32 * number) for number in range(count))
    head = gguf(count, 0, b"".join(described))
    return head + bytes(-len(head) % 32 + 32 * count)


def gguf_texts(count=65_000):
    fields = (text(b"%x" % number) + struct.pack("<I", 8) + text(b"x" * 2000) for number in range(count))
    return gguf(0, count, b"".join(fields))


def gguf_list(count=1 << 22):
    items = b"".join(text(b"%x" % number) for number in range(count))
    return gguf(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, count) + items)


LARGEST = {
    "60 MB of lists": (JSON, lambda: values(b"[]", count=20_000_000)),
    "60 MB of objects": (JSON, lambda: values(b'{"":0}', count=8_500_000)),
    "60 MB of numbers": (JSON, lambda: values(b"0", count=30_000_000)),
    "60 MB of lists in lists": (JSON, lambda: values(b"[[[[[[]]]]]]", count=4_600_000)),
    "lists": (JSON, lambda: values(b"[]", count=MAX_VALUES // 2 - 1)),
    "lists in lists": (JSON, lambda: values(b"[[[[[[]]]]]]", count=MAX_VALUES // 7 - 1)),
    "objects in objects": (JSON, lambda: values(b'{"":{}}', count=MAX_VALUES // 3 - 1)),
    "texts": (JSON, lambda: values(b'"abcdefg"', count=MAX_VALUES - 5)),
    "keys of objects": (JSON, lambda: entries(b"{}", count=MAX_VALUES // 2 - 1)),
    "keys of numbers": (JSON, lambda: entries(b"0", count=4_300_000)),
    "one wide text": (JSON, lambda: json.dumps({"a": "😀" + "a" * 60_000_000}, ensure_ascii=False).encode()),
    "a header": (HEADER, header),
    "tensors of a GGUF file": (GGUF, gguf_tensors),
    "texts of a GGUF file": (GGUF, gguf_texts),
    "a list of a GGUF file": (LIST, gguf_list),
    "one row of data": (ROWS, lambda: values(b"[]", count=5_000_000)),
    "many rows of data": (ROWS, lambda: b'{"a":"b"}\n' * 1_000_000),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read there")
@pytest.mark.parametrize("kind", LARGEST)
def test_no_file_takes_more_memory_than_a_small_machine_has(kind, tmp_path, capsys):
    how, make = LARGEST[kind]
    file = tmp_path / "file"
    file.write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(how=how), file], capture_output=True, text=True, check=True, timeout=300
    )
    peak = int(done.stdout)
    with capsys.disabled():
        outcome = "refused" if done.stderr else "read"
        sys.stdout.write(f"\n{kind}: {file.stat().st_size / 1e6:.0f} MB, {outcome} in {peak / 1e6:.0f} MB of memory\n")
    file.unlink()
    assert peak < MOST_BYTES
