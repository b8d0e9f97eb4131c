"""The Rocket Engine: the language models measured against each other, each in its own process."""
