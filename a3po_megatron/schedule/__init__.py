"""Pure planning: what goes where, decided over plain numbers, before anything moves."""
