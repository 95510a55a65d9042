"""What a statistician would do with the prompt: the baselines that a trained model is compared with."""
