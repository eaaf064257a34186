"""Starts the sandbox's server on a kernel that lacks something: ``older_kernel.py WHAT CHILD [argument]``.

A seccomp filter answers in the place of the kernel: `further` has neither Landlock nor namespaces, as many
clusters; `seccomp` knows no filters; `pretence` takes filters and does not apply them.
"""

import ctypes
import platform
import runpy
import struct
import sys

ANSWERS = {"further": 38, "seccomp": 22, "pretence": 0}  # ENOSYS, EINVAL, success
PRCTL, UNSHARE = {"x86_64": (157, 272), "aarch64": (167, 97)}[platform.machine()]


class Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(what: str) -> None:
    answer, allow = (6, 0, 0, 0x50000 | ANSWERS[what]), (6, 0, 0, 0x7FFF0000)
    load_number, load_first_argument = (0x20, 0, 0, 0), (0x20, 0, 0, 16)
    if what == "further":
        code = [load_number, (0x15, 1, 0, 444), (0x15, 0, 1, UNSHARE), answer, allow]
    else:  # prctl(PR_SET_SECCOMP, ...)
        code = [load_number, (0x15, 0, 3, PRCTL), load_first_argument, (0x15, 0, 1, 22), answer, allow]
    libc = ctypes.CDLL(None)
    given = Filter(len(code), b"".join(struct.pack("HBBI", *each) for each in code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(given), 0, 0) == 0


install(sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
