"""What a run costs: seconds, bytes, joules."""
