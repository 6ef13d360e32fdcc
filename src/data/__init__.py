"""Where images come from and how a batch of them is made."""
