"""Safetensors files made by hand, byte by byte: a writer that shares no code with the package, and can write lies."""

import json

BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E8M0": 1}
"""Bytes of one element, of the dtypes that tests write."""


def count(shape):
    """Elements of a shape."""
    product = 1
    for axis in shape:
        product *= axis
    return product


def entries_of(tensors):
    """The header's entries for tensors `{name: (dtype, shape)}`, laid end to end in the given order."""
    entries, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = position + count(shape) * BYTES_OF[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    return entries, position


def file_bytes(text, data=b"", *, length=None):
    """A file with the JSON part `text` (bytes, or a value to be encoded), and perhaps another length in front of it."""
    if not isinstance(text, bytes):
        text = json.dumps(text).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write_tensors(file, tensors, *, metadata=None):
    """Writes tensors `{name: (dtype, shape, data)}`, in the given order."""
    entries, _ = entries_of({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()})
    if metadata is not None:
        entries = {"__metadata__": metadata, **entries}
    file.write_bytes(file_bytes(entries, b"".join(data for _, _, data in tensors.values())))
    return file


def write_sparse(file, tensors):
    """Writes tensors `{name: (dtype, shape)}` of zeros that take no room on the disk."""
    entries, size = entries_of(tensors)
    head = file_bytes(entries)
    with open(file, "wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + size)
    return file


def rewrite_header(file, change):
    """Replaces the header of a file by `change(entries)`; the tensors' bytes stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    file.write_bytes(file_bytes(change(entries), content[8 + length :]))


def contents(folder):
    """Every file below a folder by its relative path, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
