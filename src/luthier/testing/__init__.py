"""The contract suite, for our methods and those of other packages."""
