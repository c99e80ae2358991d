"""Export formats of a trained model, each verified against it."""
