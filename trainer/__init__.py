"""Pure PyTorch: a TrainConfig and an ImageDataset in, ProgressReports and a trained model out."""
