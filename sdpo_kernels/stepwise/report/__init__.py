"""A run's report: pictures and a page."""
