"""Each way to the statistics, or to some of them, called as its users call it: one file a project."""
