"""What flows, in which order, and when it counts as safe. Standard library only; opens no file and no socket."""
