"""Who is where among all ranks."""
