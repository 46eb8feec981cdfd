"""One module for each revision. The number of the revision begins its name."""
