"""The report of a run and the comparison of models: pictures, a page and a table."""
