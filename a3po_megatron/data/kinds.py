"""Tells what a file is that holds no rows, so that the message can say what to do."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

HEAD = 4096  # bytes that are looked at
WHOLE = 64 << 20  # up to so many bytes a file is read as one JSON document, to see whether it is one

# First bytes → what the file is, and what to do.
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\xfd7zXZ\x00", "compressed with xz", "xz -dc {path} > prompts.jsonl"),
    (b"BZh", "compressed with bzip2", "bzip2 -dc {path} > prompts.jsonl"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)", "unpack it, or save the sheet as JSONL"),
    (b"SQLite format 3\x00", "an SQLite database", "save the table as JSONL"),
    (b"Obj\x01", "an Avro file", "save it as JSONL from where it was made"),
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself", "git lfs pull"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > prompts.jsonl"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > prompts.jsonl"),
    (b"<!DOCTYPE", "a page of HTML", "download the file itself"),
    (b"<html", "a page of HTML", "download the file itself"),
    (b"---\n", "YAML", "save it as JSONL"),
)
READ = "prompts are read from JSONL, JSON, CSV, Parquet and Arrow files (also .gz and .zst) and folders of them"


def what_else(path: Path) -> str | None:
    """What a file without rows is, and what to do about it; None where that cannot be told."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    for magic, kind, cure in MAGIC:
        if head.lower().startswith(magic.lower()) if magic.startswith(b"<") else head.startswith(magic):
            return f"is {kind}, and {READ}: {cure.format(path=path)}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] in (b"[", b"{"):
        return _json(path, start)
    first = start.partition(b"\n")[0]
    for sign, kind, suffix in ((b"\t", "tab-separated", ".tsv"), (b",", "comma-separated", ".csv")):
        if sign in first and b"{" not in first and _is_text(first):
            return f"looks like a {kind} table: a file of that kind is read where its name ends in {suffix}"
    return None


def _is_text(head: bytes) -> bool:
    """UTF-8, of which the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _json(path: Path, start: bytes) -> str | None:
    if path.stat().st_size > WHOLE:
        return None
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # rows that are JSON each, or none at all: the row is named
        return None
    if isinstance(tree, dict):
        lists = [name for name, rows in tree.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        lists = [name for name in lists if "role" not in tree[name][0]]  # the turns of a conversation: this is a row
        if lists:
            cure = f"jq -c '.[\"{lists[0]}\"][]' {path} > prompts.jsonl"
            return f"is one JSON object with a list in {lists[0]!r}, and {READ}: {cure}"
        if start.count(b"\n") > 1:
            return f"is one JSON object over several lines, and {READ}: jq -c . {path} > prompts.jsonl"
    return None
