"""Find partners of cells across two modalities."""

import argparse

from clue_dist.commands.model_arguments import (
    build_model_parser,
    name_file_arguments,
    open_model_and_store,
)
from clue_dist.neighbours.partner_settings import PARTNER_METHODS, PartnerSettings
from clue_dist.process import run_main


def main() -> None:
    """Match the cells of the store that the arguments name, and write pairs or their matrix."""
    arguments = _parse_arguments()

    from clue_dist.inference.cells import open_cells
    from clue_dist.inference.match import match_cells, require_pairs_path, write_matches
    from clue_dist.inference.reference_cells import open_reference

    with open_model_and_store(arguments, lambda: require_pairs_path(arguments.out)) as opened:
        trained_model, store, ranks = opened

        def match_store() -> None:
            reading = {"min_known": arguments.min_known}
            paired = arguments.calibrate_on and open_cells(
                arguments.calibrate_on, trained_model, name_file_arguments(), **reading
            )
            known = arguments.reference and open_reference(
                arguments.reference, trained_model, name_file_arguments(), **reading
            )
            matched = match_cells(
                trained_model,
                open_cells(store, trained_model, **reading),
                arguments.first,
                arguments.second,
                reference=known,
                settings=PartnerSettings(
                    arguments.method, arguments.partners, approximate=arguments.approximate
                ),
                within_batch=arguments.within_batch,
                calibrate_on=paired,
                batch_size=arguments.batch_size,
            )
            write_matches(matched, arguments.out)
            print(f"{matched!r}\n{arguments.out}")

        ranks.run_on_first(match_store)


def _parse_arguments() -> argparse.Namespace:
    parser = build_model_parser(
        "match",
        store="store of the cells to match",
        out="pairs as .csv, .csv.gz or .parquet, or their matrix as .npz",
    )
    parser.add_argument("--first", required=True, help="modality of the rows")
    parser.add_argument("--second", required=True, help="modality that partners are sought in")
    parser.add_argument(
        "--reference",
        metavar="STORE",
        help="cells among which partners are sought, a store or an .h5ad of `clue embed "
        "--per-modality`, as cells.h5ad of a shared model (default: those of --store)",
    )
    parser.add_argument(
        "--method", choices=PARTNER_METHODS, default="scaled", help="how (default: %(default)s)"
    )
    parser.add_argument(
        "--partners", type=int, default=1, metavar="NUMBER", help="the most that a cell gets"
    )
    parser.add_argument(
        "--within-batch", action="store_true", help="partners must be of the cell's batch"
    )
    parser.add_argument(
        "--approximate", action="store_true", help="by faiss, for more than some 100,000 cells"
    )
    parser.add_argument(
        "--calibrate-on",
        metavar="STORE",
        help="cells with both modalities that the model has not seen, which confidence is "
        "calibrated on (default: those of --store)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
