"""A frozen transformer's feed-forward branch in row blocks; its input is all that is saved."""
