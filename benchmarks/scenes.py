"""Images per minute of the scene renderer on one core: OMP_NUM_THREADS=1 python benchmarks/scenes.py"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataengine.corpora.scenes import render

NUM_IMAGES = 200


def main() -> None:
    for size in (64, 128):
        render(0, size)
        wall, cpu = time.perf_counter(), time.process_time()
        for seed in range(NUM_IMAGES):
            render(seed, size)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(
            f"{size} px: {60 * NUM_IMAGES / wall:,.0f} images/minute, {1000 * wall / NUM_IMAGES:.1f} ms each "
            f"({1000 * cpu / NUM_IMAGES:.1f} ms of processor time)"
        )


if __name__ == "__main__":
    main()
