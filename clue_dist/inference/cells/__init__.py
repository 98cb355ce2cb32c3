"""The cells that a model is asked about: those of a store, or of an AnnData or MuData in memory."""

from clue_dist.inference.cells.argument_names import ArgumentNames as ArgumentNames
from clue_dist.inference.cells.memory_cells import MemoryCells as MemoryCells
from clue_dist.inference.cells.sources import Cells as Cells
from clue_dist.inference.cells.sources import CellSource as CellSource
from clue_dist.inference.cells.sources import choose_modalities as choose_modalities
from clue_dist.inference.cells.sources import find_batch_columns as find_batch_columns
from clue_dist.inference.cells.sources import find_source_file as find_source_file
from clue_dist.inference.cells.sources import name_modalities as name_modalities
from clue_dist.inference.cells.sources import open_cells as open_cells
from clue_dist.inference.cells.sources import open_source as open_source
from clue_dist.inference.cells.sources import open_store_cells as open_store_cells
from clue_dist.inference.cells.store_cells import CellSlice as CellSlice
from clue_dist.inference.cells.store_cells import SegmentSlice as SegmentSlice
from clue_dist.inference.cells.store_cells import StoreCells as StoreCells
