"""Tells a file that is no JSONL from what it is, so that the message can say what to do."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = 4096  # bytes that are looked at
WHOLE = 64 << 20  # up to so many bytes a file is read as one JSON document, to see whether it is one

# First bytes → what the file is. What reads it is told in one line of Python, which every installation here can run.
_PARQUET = (
    'python -c "import pyarrow.parquet as p, json, sys; '
    '[print(json.dumps(row)) for row in p.read_table(sys.argv[1]).to_pylist()]" {path} > prompts.jsonl'
)
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a parquet file", _PARQUET),
    (b"ARROW1", "an Arrow file", "save it as JSONL from where it was made"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as JSONL from where it was made"),
    (b"\x1f\x8b", "compressed with gzip", "gunzip -c {path} > prompts.jsonl"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc {path} > prompts.jsonl"),
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
READ = "prompts are read from JSONL, one object a line"


def what_else(path: Path) -> str | None:
    """What a file that is no JSONL is, and what to do about it; None where that cannot be told."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".jsonl", ".parquet", ".arrow", ".json"))
        inside = f"; it holds {', '.join(files[:5])}" if files else ""
        return f"is a folder, and {READ}: name the file{inside}"
    with path.open("rb") as file:
        head = file.read(HEAD)
    for magic, kind, cure in MAGIC:
        if head.lower().startswith(magic.lower()) if magic.startswith(b"<") else head.startswith(magic):
            return f"is {kind}, and {READ}: {cure.format(path=path)}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] in (b"[", b"{"):
        return _json(path, start)
    first = start.partition(b"\n")[0]
    for sign, kind in ((b"\t", "tab-separated"), (b",", "comma-separated")):
        if sign in first and b"{" not in first:
            return f"looks like a {kind} table, and {READ}: save it as JSONL"
    return None


def _json(path: Path, start: bytes) -> str | None:
    if path.stat().st_size > WHOLE:
        return f"is one JSON array, and {READ}: jq -c '.[]' {path} > prompts.jsonl" if start[:1] == b"[" else None
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # rows that are JSON each, or none at all: the row is named
        return None
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return f"is one JSON array (of {len(tree)}), and {READ}: jq -c '.[]' {path} > prompts.jsonl"
    if isinstance(tree, dict):
        lists = [name for name, rows in tree.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        lists = [name for name in lists if "role" not in tree[name][0]]  # the turns of a conversation: this is a row
        if lists:
            cure = f"jq -c '.[\"{lists[0]}\"][]' {path} > prompts.jsonl"
            return f"is one JSON object with a list in {lists[0]!r}, and {READ}: {cure}"
        if start.count(b"\n") > 1:
            return f"is one JSON object over several lines, and {READ}: jq -c . {path} > prompts.jsonl"
    return None
