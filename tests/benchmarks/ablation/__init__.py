"""What each part of the recipe is worth: the paper's Table 5 on real cells, and the choices beyond it."""
