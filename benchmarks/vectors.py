"""Word vectors: the attributes of a data set from 400,000 x 300 word vectors (1 GB of text), beside gensim and pandas.

`python -m benchmarks.vectors [--words N] [--folder DIR] [--keep] [--out TABLE.md]`. Files are generated, read once so
that the disk does not count, and then read by each way in a process of its own, which tells its peak memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

SIZE = 300
WANTED = 400
"""Words looked up: CUB, AwA2 and SUN have 100, 89 and 135 in their attributes."""
WAYS = {
    "svip": ["glove.txt", "glove.txt.gz", "glove.zip", "word2vec.bin", "gensim.kv"],
    "gensim, full load": ["glove.txt", "word2vec.bin"],
    "pandas.read_csv": ["glove.txt"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--words", type=int, default=400_000)
    parser.add_argument("--folder", type=Path, help="for the generated files; else a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the generated files there, and use them again")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child[0], Path(options.child[1]), options.words)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="svip-vectors-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # also generating takes place in a process of its own: a child's peak memory begins with its parent's
        child("generate", folder, options.words)
        table = measured_table(folder, options.words)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(table)
    if options.out:
        options.out.write_text(table + "\n", encoding="utf-8")


def measured_table(folder: Path, words: int) -> str:
    rows, sums, seconds = [], set(), {}
    for way, files in WAYS.items():
        for name in files:
            found = child(way, folder / name, words)
            sums.add(found["sum"])
            seconds[way, name] = found["seconds"]
            parts = [folder / name, folder / f"{name}.vectors.npy"]
            size = sum(part.stat().st_size for part in parts if part.exists())
            rows.append(
                f"| {way} | `{name}` | {size / 1e6:,.0f} MB | {found['seconds']:.2f} | "
                f"{found['imports']:.2f} | {found['peak']:.0f} MB | {found['imported']:.0f} MB |"
            )
            print(rows[-1], file=sys.stderr)
    assert len(sums) == 1, f"the ways disagree about the vectors: {sums}"
    times = seconds["gensim, full load", "glove.txt"] / seconds["svip", "glove.txt"]
    return "\n".join(
        [
            f"{words:,} words of {SIZE} numbers, {WANTED} of them wanted; the same vectors from each way.",
            f"Of text, svip is {times:.0f} times faster than gensim's full load.",
            "",
            "| way | file | size | seconds | seconds of imports | peak memory | of it after imports |",
            "|---|---|--:|--:|--:|--:|--:|",
            *rows,
        ]
    )


def child(way: str, path: Path, words: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.vectors", "--words", str(words), "--child", way, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def measure(way: str, path: Path, words: int) -> None:
    """Do one thing and print what it took as JSON; ``seconds`` has all but the imports."""
    if way == "generate":
        generate(path, words)
        print("{}")
        return
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass  # now it is in the page cache
    wanted = wanted_words(words)
    begin = time.perf_counter()
    if way == "svip":
        from svip.semantics.vectors import embed_attributes
    elif way == "gensim, full load":
        from gensim.models import KeyedVectors
    else:
        import pandas as pd
    imports, imported = time.perf_counter() - begin, peak()
    begin = time.perf_counter()
    if way == "svip":
        vectors = embed_attributes([[word] for word in wanted], wanted, path).vectors
    elif way == "gensim, full load":
        binary = path.suffix == ".bin"
        vectors = KeyedVectors.load_word2vec_format(str(path), binary=binary, no_header=not binary)[wanted]
    else:
        types = {0: str} | dict.fromkeys(range(1, SIZE + 1), "float32")
        table = pd.read_csv(path, sep=" ", header=None, index_col=0, quoting=3, na_filter=False, dtype=types)
        vectors = table.loc[wanted].to_numpy()
    seconds = time.perf_counter() - begin
    total = round(float(abs(vectors).sum(dtype="float64")), 2)
    print(json.dumps({"seconds": seconds, "imports": imports, "peak": peak(), "imported": imported, "sum": total}))


def peak() -> float:
    """The largest memory that this process ever had, in MB; pages of mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def wanted_words(words: int) -> list[str]:
    """Words spread over the whole file, the first and the last among them."""
    return [word_at(index * (words - 1) // (WANTED - 1)) for index in range(WANTED)]


def word_at(index: int) -> str:
    """A word of four to eight letters, another for each index."""
    letters = ""
    while len(letters) < 4 or index:
        index, letter = divmod(index, 26)
        letters += chr(ord("a") + letter)
    return letters + "z" * (len(letters) % 3)


def generate(folder: Path, words: int) -> None:
    """The same vectors as GloVe text, packed text, word2vec's binary form and a gensim KeyedVectors."""
    import numpy as np

    # so many different rows, over and over: formatting 120 million numbers would take minutes
    rows = np.random.default_rng(0).normal(0, 0.4, (2000, SIZE)).round(5).astype(np.float32)
    lines = [f" {' '.join(f'{value:.5f}' for value in row)}\n".encode() for row in rows]
    kinds = [index * 7919 % len(rows) for index in range(words)]
    text = folder / "glove.txt"
    if text.exists() and (folder / "gensim.kv").exists():
        return
    with open(text, "wb", buffering=1 << 20) as file:
        for index, kind in enumerate(kinds):
            file.write(word_at(index).encode() + lines[kind])
    with open(text, "rb") as file, gzip.open(f"{text}.gz", "wb", compresslevel=1) as packed:
        shutil.copyfileobj(file, packed, 1 << 20)
    with ZipFile(folder / "glove.zip", "w", ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(text, "glove.txt")
    with open(folder / "word2vec.bin", "wb", buffering=1 << 20) as file:
        file.write(f"{words} {SIZE}\n".encode())
        for index, kind in enumerate(kinds):
            file.write(f"{word_at(index)} ".encode() + rows[kind].tobytes())
    from gensim.models import KeyedVectors

    vectors = KeyedVectors(SIZE)
    vectors.add_vectors([word_at(index) for index in range(words)], rows[kinds])
    vectors.save(str(folder / "gensim.kv"))


if __name__ == "__main__":
    main()
