"""Every number that the README claims, and the command that makes it."""
