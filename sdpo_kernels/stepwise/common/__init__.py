"""What every other room uses: errors, whole-or-absent files, progress, units, ranks."""
