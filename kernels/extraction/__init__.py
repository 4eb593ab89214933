"""Modal tokens attend to the tiles of their case."""
