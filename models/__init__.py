"""The two architectures and their backbones."""
