"""For all tests: Ctrl-C arrives in what they start, also where a shell runs pytest in the background and ignores it."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
