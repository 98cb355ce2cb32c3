"""Are the plan's batches as random as independent draws, out of an atlas sorted by plate and by cell type?"""
