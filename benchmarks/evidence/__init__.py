"""What entropy methods do in training: a plan made before the runs, the runs, and a report made of their rows."""
