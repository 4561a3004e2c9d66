"""What the data path costs: python benchmarks/data.py TOKENIZER_FOLDER NAME=PATH ...

Reads the mixture's parts (8,000 rows each in our copies), draws 7,100 of each, templates and tokenises
them, once without a cache and once from it, each in a process of its own.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {"train": 5000, "validation": 100, "test": 2000}  # of each part: nearly all of 8,000


def once(tokenizer_folder: str, sources: list[str]) -> dict:
    from transformers import AutoTokenizer

    from harness.data import Template, load_spec, token_rows

    template = Template(AutoTokenizer.from_pretrained(tokenizer_folder), "auto")
    dataset, locations = load_spec("mixture", ROWS), dict(source.split("=", 1) for source in sources)
    wall, cpu = time.perf_counter(), time.process_time()
    found = token_rows(dataset, locations, template, 512)
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": {split: len(rows) for split, rows in found.rows.items()},
        "left_out": {what: count for what, count in found.left_out.items() if count},
    }


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        sys.exit(__doc__)
    if os.environ.get("TUNEOFF_CACHE"):
        print(json.dumps(once(arguments[0], arguments[1:])))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TUNEOFF_CACHE": folder}
        for name in ("first", "cached"):
            print(name, flush=True)
            subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:])
