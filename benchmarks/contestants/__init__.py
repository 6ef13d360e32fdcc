"""Programs that do the same training in different ways, one epoch whenever the race says so."""
