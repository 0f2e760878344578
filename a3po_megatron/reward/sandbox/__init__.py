"""Runs programs that nobody has read: bubblewrap, Landlock, a remote sandbox, or none where it is told so by name."""
