"""Programs that do the same training in different ways, one epoch whenever the race says so."""

BATCH = 32
TRAINABLE = {"last4": 4, "head": 0}
"""How many layers of the backbone train, for each job."""
