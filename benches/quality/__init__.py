"""What the synthetic images are worth, on Fashion-MNIST."""
