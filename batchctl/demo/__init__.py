"""A real batch on real data, to see everything work once."""
