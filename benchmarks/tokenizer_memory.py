"""How much memory does one job with a million vectors take? Run as a process of its own.

The peak is the kernel's high-water mark of this process alone: a limit on it says whether a
catalogue of that size fits on a machine.

    python -m benchmarks.tokenizer_memory fit | stream | whole FILE.npy ...
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artifacts import fingerprint
from genrec.data import Catalog
from genrec.tokenizers.base import ItemTokenizer
from genrec.tokenizers.files.streaming import encode_file
from genrec.tokenizers.rqkmeans import RQKMeans

ROOT = Path(__file__).parents[1]
GB = 1e9
BLOCK = 50_000


def write_vectors(path: Path, num_items: int, width: int, seed: int = 0) -> None:
    """Write clustered vectors (num_items, width) float32 to an npy file, in blocks."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((1_000, width), dtype=np.float32)
    shape = (num_items, width)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, num_items, BLOCK):
        size = min(BLOCK, num_items - start)
        noise = rng.standard_normal((size, width), dtype=np.float32)
        out[start : start + size] = centres[rng.integers(0, 1_000, size)] + 0.5 * noise
    out.flush()


def measure(job: str, vectors: Path, *options: str) -> dict[str, Any]:
    """Run one job in a fresh process; return what it printed."""
    command = [sys.executable, "-m", "benchmarks.tokenizer_memory", job, str(vectors), *options]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_gb() -> float:
    """Return the most memory that this process has held.

    Linux keeps `ru_maxrss` over exec, so that it would count the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024 / GB
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor / GB


def fit(vectors: Path, num_codes: int) -> dict[str, Any]:
    """Fit RQ-KMeans on a file that is read as a whole."""
    catalog = Catalog.from_vectors(np.load(vectors))
    tokenizer = RQKMeans(RQKMeans.Config(codebook_size=num_codes)).fit(catalog)
    return {"codebook_sizes": list(tokenizer.codebook_sizes)}


def stream(vectors: Path, tokenizer: ItemTokenizer) -> dict[str, Any]:
    """Code a file batch by batch."""
    with tempfile.TemporaryDirectory(dir=vectors.parent) as folder:
        done = encode_file(tokenizer, vectors, Path(folder) / "codes.npy")
        return {"codes": fingerprint(np.load(done.path))}


def whole(vectors: Path, tokenizer: ItemTokenizer) -> dict[str, Any]:
    """Code a file that is read as a whole."""
    return {"codes": fingerprint(tokenizer.encode(Catalog.from_vectors(np.load(vectors))))}


def main() -> None:
    """Run one job and print its figures as JSON."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["fit", "stream", "whole"])
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = ItemTokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    start = peak_gb()
    wall, cpu = time.perf_counter(), time.process_time()
    if tokenizer is None:
        found = fit(arguments.vectors, arguments.codes)
    else:
        found = {"stream": stream, "whole": whole}[arguments.job](arguments.vectors, tokenizer)
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    print(json.dumps(found | {"peak_gb": peak_gb(), "peak_before_gb": start}))


if __name__ == "__main__":
    main()
