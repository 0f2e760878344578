"""Where prompts come from, and how a problem becomes the tokens of a prompt."""
