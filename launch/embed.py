"""python launch/embed.py --run RUN --store S.zarr --out OUT.h5mu|.h5ad|.zarr [--per-modality]

Under `deepspeed`, torchrun or srun the store is split over the ranks.
"""

import argparse
from pathlib import Path

from clue_dist.embed import check_output, embed_store
from clue_dist.errors import run_main
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.train.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/embed.py", description="Embed a store with a trained model.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--store", type=Path, required=True, help="store of the cells to embed")
    parser.add_argument("--out", type=Path, required=True, help="OUT.h5mu, OUT.h5ad or OUT.zarr")
    parser.add_argument("--per-modality", action="store_true", help="also the full z from each modality alone")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a checkpoint's name")
    parser.add_argument("--batch-size", type=int, default=4096, help="cells at once")
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # the launcher's; LOCAL_RANK says it too
    args = parser.parse_args()

    check_output(args.out)
    ranks = Ranks.from_env().init()
    loaded, store = load_model(args.run, args.checkpoint), Store(args.store)
    embed_store(
        loaded,
        store,
        args.out,
        run=args.run,
        per_modality=args.per_modality,
        batch_size=args.batch_size,
        ranks=ranks,
    )
    if ranks.first:
        print(f"{store.manifest.n_cells:,} cells embedded with {args.run} ({loaded.name})\n{args.out}")
    ranks.close()


if __name__ == "__main__":
    run_main(main)
