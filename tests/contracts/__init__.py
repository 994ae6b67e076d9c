"""One file a shape, parametrised by the catalogue."""
