"""The memory that training will take, planned without weights and without a GPU."""
