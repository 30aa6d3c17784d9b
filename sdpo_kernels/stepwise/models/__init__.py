"""The one resident model: how it is loaded, its precision, and how it is sharded."""
