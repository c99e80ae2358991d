"""The service: decides what to try, who runs it, when to stop; and the command line."""
