"""What the kernel is told of files changes none of them."""

import os

from portllm.files import page_cache


def test_telling_the_kernel_changes_no_byte(tmp_path):
    file = tmp_path / "file"
    with open(file, "wb+", buffering=0) as opened:
        opened.write(bytes(range(256)) * 100)
        page_cache.release(opened.fileno(), 1000, 5000)
        page_cache.release(opened.fileno())
        page_cache.fetch(opened.fileno(), 20_000, 1 << 30)
    assert file.read_bytes() == bytes(range(256)) * 100


def test_a_system_that_cannot_be_told_is_left_alone(monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    page_cache.fetch(-1, 0, 1)
    page_cache.release(-1)


def test_a_quarter_of_the_memory_is_large():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert not page_cache.is_large(memory // 5)
    assert page_cache.is_large(memory // 3)
