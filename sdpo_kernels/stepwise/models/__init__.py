"""The one resident model: loaded, in its precision, whole or sharded."""
