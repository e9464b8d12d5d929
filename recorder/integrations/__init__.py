"""One file per foreign trainer; each names its library and nobody else does."""
