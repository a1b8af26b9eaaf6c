"""Joins the measurements that gpu_check.sh made, as one table and one file.

python benchmarks/gpu_summary.py FOLDER RESULT
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _timing import report


def device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "torch_cuda": torch.version.cuda,
    }


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    rows = []
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        rows += [{"benchmark": path.stem, **row} for row in json.loads(path.read_text())["rows"]]
    if not rows:
        print("nothing was measured")
        return 1
    report(f"fasthyp on {torch.cuda.get_device_name()}", rows, sys.argv[2], **device())
    return 0


if __name__ == "__main__":
    sys.exit(main())
