"""What `a3po doctor` looks at (probe, child, tools), what it makes of it (judge), and how it says so (examine)."""
