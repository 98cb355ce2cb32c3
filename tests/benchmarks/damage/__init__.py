"""Is a store that was damaged ever served wrong, and does `data_prep check` find every damage and name its place?"""
