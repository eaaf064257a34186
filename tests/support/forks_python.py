"""Imported first by a process that programs are forked from, before others take `Popen` from subprocess."""

from __future__ import annotations

import subprocess

from support.becoming import ForkedPopen

subprocess.Popen = ForkedPopen  # type: ignore[misc]
