"""How ranks are started, and what a rank needs around it."""
