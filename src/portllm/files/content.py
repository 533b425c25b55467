"""What a file is that is not what its name says, by its first bytes. Pure.

Such files come from downloads: a repository that was cloned without its large files, a page that was saved in place of
what it links to, weights that were renamed.
"""

LFS_POINTER = b"version https://git-lfs"
FETCH = "Fetch the file itself: 'git lfs pull' in its folder, or 'hf download ORG/NAME --local-dir FOLDER'."

FEWEST = 8
"""Bytes that tell: as many as a safetensors file has before its header."""

_BEGINNINGS = (
    (
        (LFS_POINTER[:FEWEST],),
        f"is a Git LFS pointer, the note that stands for a file which was not downloaded. {FETCH}",
    ),
    ((b"<!doctyp", b"<!DOCTYP", b"<html"), f"is a web page, saved in place of the file that it links to. {FETCH}"),
    (
        (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6))),
        "is a pickle (or another archive), which can run code and is never read. Convert it with the program that "
        "made it: save_pretrained writes safetensors.",
    ),
    ((b"GGUF",), "is a GGUF file under another name. Name it .gguf."),
)  # fmt: skip


def mistaken(head: bytes) -> str | None:
    """What a file is that begins so, and what to do; None for what could be anything.

    Example:
        >>> mistaken(b"version https://git-lfs.github.com/spec/v1")[:20]
        'is a Git LFS pointer'
        >>> mistaken(b'{"peft_type": "LORA"}') is None
        True
    """
    return next((text for beginnings, text in _BEGINNINGS if head.startswith(beginnings)), None)
