"""Pages of memory that two processes share, without a file descriptor to keep for them.

`mmap.mmap` keeps one of its own for each, unless told not to, which it can be since Python 3.13. Before that, the C
library puts the file in the place of memory that has none. Either way it is the `mmap` object that gives the memory
back, when the last view of it goes, and it runs no Python for that: a signal handler could raise there, unheard.

What is needed for that is imported here, not at the first call of a process: a handler could raise in its midst. So
workers that are forked share it, too.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
from collections.abc import Callable

if sys.version_info < (3, 13) and sys.platform == "linux":
    try:
        import ctypes
    except ImportError:  # an interpreter without it: each page keeps a descriptor
        pass

__all__ = ["mapped"]

_MAP_FIXED = 0x10  # of Linux, which `mmap` has no name for


def mapped(descriptor: int, size: int) -> memoryview:
    """Map a file's first bytes, to be read and written as words of eight bytes.

    Args:
        descriptor: Of the file, which nobody can make smaller: touching what is gone would end the process. It may be
            closed afterwards.
        size: In bytes, a multiple of a page.

    Raises:
        OSError: There is no memory, or the file is not for that.
        ValueError: The file is smaller.
    """
    if sys.version_info >= (3, 13):
        return memoryview(mmap.mmap(descriptor, size, trackfd=False)).cast("Q")
    try:
        put_in_place = _from_the_c_library()
    except (NameError, OSError, AttributeError):
        return memoryview(mmap.mmap(descriptor, size)).cast("Q")
    memory = mmap.mmap(-1, size)
    put_in_place(memory, size, descriptor)
    return memoryview(memory).cast("Q")


@functools.cache
def _from_the_c_library() -> Callable[[mmap.mmap, int, int], None]:
    library = ctypes.CDLL(None, use_errno=True)
    place = library.mmap
    place.restype = ctypes.c_void_p
    place.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_ssize_t,  # as wide as the offset of a file wherever there is such memory
    )
    failed = ctypes.c_void_p(-1).value

    def put_in_place(memory: mmap.mmap, size: int, descriptor: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if place(address, size, access, kind, descriptor, 0) == failed:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return put_in_place
