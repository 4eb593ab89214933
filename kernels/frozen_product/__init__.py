"""Products with frozen weights: nothing of the input is saved, and the fastest library is used."""
