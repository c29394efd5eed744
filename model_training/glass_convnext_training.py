"""Train and evaluate GLASS with ConvNeXt-Tiny: five seeds of 50 epochs at the tuned values.

    python -m model_training.glass_convnext_training [--preset demo] [--seeds 100 200] [--epochs N]

Hardware: one CUDA GPU, and as many CPU cores as there are: at the paper's size, loading images alone takes about
60 core-hours (README, Hardware and hours). With --preset demo: minutes on two CPU cores.
Leaves results/<preset>/glass_convnext/seed_<seed>/: checkpoint, history, predictions and test metrics.
"""

from model_training.run import main

if __name__ == "__main__":
    main("glass_convnext", __doc__)
