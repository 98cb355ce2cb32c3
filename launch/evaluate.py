"""python launch/evaluate.py --run RUN --store S.zarr --out scores.json

Under `deepspeed`, torchrun or srun the work is split over the ranks.
"""

import argparse
from pathlib import Path

from clue_dist.errors import run_main
from clue_dist.evaluate import evaluate_store, table
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.train.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Score how well modalities match.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--store", type=Path, required=True, help="store with paired cells the model has not seen")
    parser.add_argument("--out", type=Path, required=True, help="where to write scores.json")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a checkpoint's name")
    parser.add_argument("--max-cells", type=int, help="score a random part of the paired cells")
    parser.add_argument("--batch-size", type=int, default=4096, help="cells embedded at once")
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # the launcher's; LOCAL_RANK says it too
    args = parser.parse_args()

    ranks = Ranks.from_env().init()
    result = evaluate_store(
        load_model(args.run, args.checkpoint),
        Store(args.store),
        args.out,
        run=args.run,
        max_cells=args.max_cells,
        batch_size=args.batch_size,
        ranks=ranks,
    )
    if ranks.first:
        print(f"{table(result)}\n{args.out}")
    ranks.close()


if __name__ == "__main__":
    run_main(main)
