"""Train and evaluate standard transfer learning with a ResNet (paper: ResNet-50, five seeds of 50 epochs).

    python -m model_training.standard_resnet_training [--preset demo] [--seeds 100 200] [--epochs N]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/standard_resnet/seed_<seed>/ with weights, history, predictions and test metrics.
"""

if __name__ == "__main__":
    from model_training.run import main

    main("standard_resnet", __doc__)
