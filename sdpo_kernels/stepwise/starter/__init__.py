"""What `sdpo init` writes: a task, a tiny model, and a run that trains it."""
