"""Other projects' own DPO trainers, with and without our adapters: `make trainers`."""
